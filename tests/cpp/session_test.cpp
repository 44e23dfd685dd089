// Sessions over a tiny random model: whatever the drafter, the batch, the chunking or the room in
// the cache, the tokens are those of decoding one request alone, one token at a time.
// SPDX-License-Identifier: Apache-2.0
#include "medusa/session.h"

#include <atomic>
#include <map>
#include <random>
#include <stdexcept>
#include <thread>

#include "check.h"
#include "medusa/error.h"
#include "tiny_model.h"

using medusa::Event;
using medusa::Finish;
using medusa::Request;
using medusa::SamplingParams;
using medusa::Session;
using medusa::SessionOptions;

namespace {

using Tokens = std::vector<int32_t>;

struct Answer {
  Tokens tokens;
  Finish finish = Finish::none;
  medusa::RequestStats stats;
  bool operator==(const Answer& other) const {
    return tokens == other.tokens && finish == other.finish;
  }
};

const std::shared_ptr<const medusa::Model>& model() {
  static const std::shared_ptr<const medusa::Model> shared = test::tiny_model();
  return shared;
}

std::vector<Answer> run_all(Session& session, const std::vector<Request>& requests) {
  std::map<int64_t, size_t> place;
  for (size_t i = 0; i < requests.size(); ++i) place[session.submit(requests[i])] = i;
  std::vector<Answer> answers(requests.size());
  for (int guard = 0; !session.idle(); ++guard) {
    if (guard > 100000) throw std::runtime_error("the session does not end");
    for (const Event& event : session.step()) {
      Answer& answer = answers[place.at(event.request)];
      CHECK(answer.finish == Finish::none);  // nothing follows the last event
      answer.tokens.insert(answer.tokens.end(), event.tokens.begin(), event.tokens.end());
      answer.finish = event.finish;
      if (event.finish != Finish::none) answer.stats = event.stats;
    }
  }
  CHECK(session.step().empty());
  return answers;
}

// Each request alone, in a session of its own, with no drafter.
std::vector<Answer> plain(const std::vector<Request>& requests) {
  std::vector<Answer> answers;
  for (const Request& request : requests) {
    Session session(model(), nullptr, {.max_batch = 1});
    answers.push_back(run_all(session, {request})[0]);
  }
  return answers;
}

// Knows the answers and proposes them, some tokens replaced, among wrong siblings before and after
// the right node.
class KnowingDrafter : public medusa::Drafter {
 public:
  KnowingDrafter(const std::vector<Request>& requests, const std::vector<Answer>& answers) {
    for (size_t i = 0; i < requests.size(); ++i) {
      Tokens text = requests[i].tokens;
      text.insert(text.end(), answers[i].tokens.begin(), answers[i].tokens.end());
      texts_.push_back(std::move(text));
    }
  }

  void draft(std::span<const medusa::DraftInput> inputs,
             std::span<medusa::DraftTree> trees) override {
    for (size_t i = 0; i < inputs.size(); ++i) grow(inputs[i], trees[i]);
  }
  void on_finish(int64_t /*request*/) override { ++finished; }
  int max_nodes() const override { return 40; }

  std::atomic<int> finished{0};

 private:
  void grow(const medusa::DraftInput& input, medusa::DraftTree& tree) {
    const size_t len = input.tokens.size();
    const Tokens* text = nullptr;
    for (const Tokens& one : texts_) {
      if (one.size() >= len && std::equal(input.tokens.begin(), input.tokens.end(), one.begin())) {
        text = &one;
      }
    }
    int node = 0;
    for (size_t at = len; text != nullptr && at < text->size(); ++at) {
      if (tree.num_nodes() + 4 > input.max_nodes || tree.depth(node) >= input.max_depth) return;
      for (unsigned wrong = random_() % 3; wrong > 0; --wrong) tree.add(node, any_token());
      if (random_() % 6 == 0) return;
      const int next = tree.add(node, (*text)[at]);
      if (random_() % 2 == 0) tree.add(node, any_token());
      node = next;
    }
  }

  int32_t any_token() { return static_cast<int32_t>(random_() % 61); }

  std::vector<Tokens> texts_;
  std::mt19937 random_{5};
};

std::vector<Request> random_requests(int count, unsigned seed, int max_prompt = 90) {
  std::mt19937 random(seed);
  std::vector<Request> requests;
  for (int i = 0; i < count; ++i) {
    Request request;
    const auto length = 1 + random() % static_cast<unsigned>(max_prompt);
    for (unsigned t = 0; t < length; ++t)
      request.tokens.push_back(static_cast<int32_t>(random() % 61));
    request.max_new_tokens = static_cast<int>(1 + random() % 70);
    if (random() % 2 == 0) {
      request.sampling.temperature = 0.3f + 0.1f * static_cast<float>(random() % 12);
      request.sampling.seed = random();
      if (random() % 2 == 0) request.sampling.top_k = static_cast<int>(1 + random() % 20);
      if (random() % 2 == 0) request.sampling.top_p = 0.8;
      if (random() % 2 == 0) request.sampling.min_p = 0.05;
    }
    if (random() % 3 == 0) request.sampling.repetition_penalty = 1.3f;
    if (random() % 2 == 0) request.eos_ids = {static_cast<int32_t>(random() % 61), 7};
    request.reuse_prefix = random() % 2 == 0;
    requests.push_back(std::move(request));
  }
  return requests;
}

int64_t deep_steps(const std::vector<Answer>& answers) {  // steps that emitted four tokens or more
  int64_t steps = 0;
  for (const Answer& answer : answers) {
    const auto& lengths = answer.stats.accepted_lengths;
    for (size_t n = 4; n < lengths.size(); ++n) steps += lengths[n];
  }
  return steps;
}

}  // namespace

TEST(trees_change_nothing) {
  const std::vector<Request> requests = random_requests(24, 1);
  const std::vector<Answer> wanted = plain(requests);
  int64_t stopped = 0, across = 0;
  for (const Answer& answer : wanted) stopped += answer.finish == Finish::stop;
  CHECK(stopped > 2);
  for (const int batch : {1, 3, 13}) {
    for (const int chunk : {1, 7, 512}) {
      const auto drafter = std::make_shared<KnowingDrafter>(requests, wanted);
      Session session(model(), drafter, {.max_batch = batch, .prefill_chunk = chunk});
      const std::vector<Answer> answers = run_all(session, requests);
      CHECK(answers == wanted);
      CHECK(deep_steps(answers) > 20);
      CHECK(drafter->finished == 24);
      across += session.stats().compactions_across_pages;
    }
  }
  CHECK(across > 10);
}

TEST(own_drafters_change_nothing) {
  const std::vector<Request> requests = random_requests(12, 2);
  const std::vector<Answer> wanted = plain(requests);
  const medusa::TreeSpec tree = medusa::TreeSpec::from_paths({{0}, {1}, {0, 0}, {1, 2}, {0, 0, 1}});
  for (const auto& drafter : {medusa::make_medusa_drafter(model(), tree),
                              medusa::make_prompt_lookup_drafter({.min_ngram = 1})}) {
    Session session(model(), drafter, {.max_batch = 4});
    CHECK(run_all(session, requests) == wanted);
  }
}

TEST(set_backs_change_nothing) {
  std::vector<Request> requests = random_requests(12, 3, 20);
  for (Request& request : requests) request.max_new_tokens = 200;
  const std::vector<Answer> wanted = plain(requests);
  const auto drafter = std::make_shared<KnowingDrafter>(requests, wanted);
  Session session(model(), drafter, {.max_batch = 6, .cache_tokens = 1});
  CHECK(run_all(session, requests) == wanted);
  CHECK(session.stats().set_backs > 0);
  CHECK(session.stats().pages_used == 0);
}

TEST(the_last_position_of_the_context_is_used) {
  std::vector<Request> requests = random_requests(4, 4, 20);
  for (Request& request : requests) {
    request.max_new_tokens = 0;
    request.eos_ids.clear();
  }
  requests[0].tokens.assign(255, 3);
  const std::vector<Answer> wanted = plain(requests);
  for (size_t i = 0; i < requests.size(); ++i) {
    CHECK(requests[i].tokens.size() + wanted[i].tokens.size() == 256);
    CHECK(wanted[i].finish == Finish::length);
  }
  Session session(model(), std::make_shared<KnowingDrafter>(requests, wanted), {});
  CHECK(run_all(session, requests) == wanted);
}

TEST(threads_and_dtypes_change_nothing) {
  const std::vector<Request> requests = random_requests(4, 5);
  for (const auto dtype : {medusa::DType::f32, medusa::DType::f16, medusa::DType::bf16}) {
    std::vector<std::vector<Answer>> answers;
    for (const int threads : {1, 2, 3}) {
      Session session(test::tiny_model(threads, dtype), nullptr, {.max_batch = 2});
      answers.push_back(run_all(session, requests));
    }
    CHECK(answers[0] == answers[1]);
    CHECK(answers[0] == answers[2]);
  }
}

TEST(chat_turns_reuse_the_cache) {
  Session session(model(), nullptr, {});
  Request request{.tokens = Tokens(100, 4), .max_new_tokens = 30};
  for (int turn = 0; turn < 4; ++turn) {
    CHECK(run_all(session, {request}) == plain({request}));
    const Answer answer = run_all(session, {request})[0];
    CHECK(answer.stats.reused_tokens >= 99);
    request.tokens.insert(request.tokens.end(), answer.tokens.begin(), answer.tokens.end());
    request.tokens.push_back(turn);
    request.max_new_tokens = 10;
  }
}

TEST(cancelled_requests_end_once_and_free_their_pages) {
  const std::vector<Request> requests = random_requests(10, 6);
  const std::vector<Answer> wanted = plain(requests);
  Session session(model(), nullptr, {.max_batch = 3});
  std::vector<int64_t> ids;
  std::map<int64_t, Answer> answers;
  for (const Request& request : requests) ids.push_back(session.submit(request));
  for (int step = 0; !session.idle(); ++step) {
    if (step == 2) {
      for (const size_t i : {0u, 4u, 9u}) session.cancel(ids[i]);
    }
    for (const Event& event : session.step()) {
      Tokens& tokens = answers[event.request].tokens;
      tokens.insert(tokens.end(), event.tokens.begin(), event.tokens.end());
      CHECK(answers[event.request].finish == Finish::none);
      answers[event.request].finish = event.finish;
    }
  }
  for (size_t i = 0; i < ids.size(); ++i) {
    const Answer& answer = answers[ids[i]];
    CHECK(answer.finish != Finish::none);
    CHECK(answer == wanted[i] ||
          (answer.finish == Finish::cancelled && (i == 0 || i == 4 || i == 9)));
  }
  CHECK(answers[ids[9]].finish == Finish::cancelled);
  CHECK(!session.cancel(ids[0]));
  CHECK(!session.cancel(12345));
  CHECK(session.stats().pages_used == 0);
}

TEST(many_threads_use_one_session) {
  const std::vector<Request> requests = random_requests(12, 7, 30);
  const std::vector<Answer> wanted = plain(requests);
  Session session(model(), std::make_shared<KnowingDrafter>(requests, wanted), {.max_batch = 4});
  std::mutex mutex;
  std::map<int64_t, Answer> answers;
  std::vector<int64_t> ids(requests.size());
  std::vector<std::thread> threads;
  for (size_t t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      for (size_t i = t; i < requests.size(); i += 3) ids[i] = session.submit(requests[i]);
      while (!session.idle()) {
        // The lock covers the step too: two threads' events of one request must be kept in order.
        const std::lock_guard lock(mutex);
        for (const Event& event : session.step()) {
          Answer& answer = answers[event.request];
          answer.tokens.insert(answer.tokens.end(), event.tokens.begin(), event.tokens.end());
          answer.finish = event.finish;
        }
      }
      session.stats();
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (size_t i = 0; i < requests.size(); ++i) CHECK(answers[ids[i]] == wanted[i]);
}

TEST(steps_and_cancels_from_many_threads_do_not_race) {
  Session session(model(), medusa::make_prompt_lookup_drafter({}), {.max_batch = 3});
  std::atomic<int> ended{0};
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      for (const Request& request : random_requests(6, 100 + t, 20)) {
        const int64_t id = session.submit(request);
        for (const Event& event : session.step()) ended += event.finish != Finish::none;
        if (id % 2 == 0) session.cancel(id);
      }
      while (!session.idle()) {
        for (const Event& event : session.step()) ended += event.finish != Finish::none;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(ended == 18);
}

TEST(a_throwing_drafter_leaves_the_session_usable) {
  class Throwing : public KnowingDrafter {
   public:
    using KnowingDrafter::KnowingDrafter;
    void draft(std::span<const medusa::DraftInput> inputs,
               std::span<medusa::DraftTree> trees) override {
      if (++calls % 3 == 0) throw std::runtime_error("drafter down");
      KnowingDrafter::draft(inputs, trees);
    }
    int calls = 0;
  };
  const std::vector<Request> requests = random_requests(5, 8);
  const std::vector<Answer> wanted = plain(requests);
  Session session(model(), std::make_shared<Throwing>(requests, wanted), {.max_batch = 2});
  std::vector<Answer> answers(requests.size());
  std::map<int64_t, size_t> place;
  for (size_t i = 0; i < requests.size(); ++i) place[session.submit(requests[i])] = i;
  int thrown = 0;
  while (!session.idle()) {
    try {
      for (const Event& event : session.step()) {
        Answer& answer = answers[place.at(event.request)];
        answer.tokens.insert(answer.tokens.end(), event.tokens.begin(), event.tokens.end());
        answer.finish = event.finish;
      }
    } catch (const std::runtime_error&) {
      ++thrown;
    }
  }
  CHECK(thrown > 3);
  CHECK(answers == wanted);
}

TEST(bad_requests_are_refused) {
  Session session(model(), nullptr, {});
  const auto submit = [&](Request request) { session.submit(std::move(request)); };
  CHECK_THROWS(medusa::ArgumentError, "empty", submit({}));
  CHECK_THROWS(medusa::ArgumentError, "61", submit({.tokens = {61}}));
  CHECK_THROWS(medusa::ArgumentError, "-1", submit({.tokens = {-1}}));
  CHECK_THROWS(medusa::ArgumentError, "256", submit({.tokens = Tokens(256, 1)}));
  CHECK_THROWS(medusa::ArgumentError, "temperature",
               submit({.tokens = {1}, .sampling = {.temperature = -1}}));
  CHECK_THROWS(medusa::ArgumentError, "top_p", submit({.tokens = {1}, .sampling = {.top_p = 0}}));
  CHECK(session.idle());
  CHECK_THROWS(medusa::ArgumentError, "max_batch", Session(model(), nullptr, {.max_batch = 0}));
  CHECK_THROWS(medusa::ArgumentError, "max_context",
               Session(model(), nullptr, {.max_context = 257}));
}

TEST(score_does_not_depend_on_chunks) {
  const Request request = random_requests(1, 9)[0];
  const size_t rows = request.tokens.size();
  std::vector<float> first(rows * 61), other(rows * 61), hidden(rows * 32);
  medusa::score(*model(), request.tokens, 512, first.data(), hidden.data());
  for (const int chunk : {1, 3, 64}) {
    medusa::score(*model(), request.tokens, chunk, other.data(), nullptr);
    CHECK(other == first);
  }
}
