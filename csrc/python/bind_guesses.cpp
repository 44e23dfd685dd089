// Trees that each step grows anew: n-grams, weights, and what calibration asks about them.
// SPDX-License-Identifier: Apache-2.0
#include <memory>
#include <tuple>
#include <utility>

#include "medusa/guesses.h"
#include "medusa/session.h"
#include "python/bindings.h"

namespace medusa::python {
namespace {

template <class T>
std::vector<T> numbers(const py::array_t<T, py::array::c_style>& array) {
  return {array.data(), array.data() + array.size()};
}

using Ids = py::array_t<int32_t, py::array::c_style>;
using Gains = py::array_t<int8_t, py::array::c_style>;

std::shared_ptr<Ngrams> make_ngrams(const Ids& contexts, const Ids& counts, const Gains& unseen,
                                    const Ids& tokens, const Gains& gains, const Ids& pair_counts,
                                    const Gains& pair_unseen, const Ids& pair_tokens,
                                    const Gains& pair_gains) {
  return std::make_shared<Ngrams>(NgramArrays{
      numbers(contexts), numbers(counts), numbers(unseen), numbers(tokens), numbers(gains),
      numbers(pair_counts), numbers(pair_unseen), numbers(pair_tokens), numbers(pair_gains)});
}

using HeadWeights = std::tuple<float, float, float, std::vector<float>>;

// An answer whose tokens are its own; the arrays are borrowed and fit it.
struct HeldAnswer {
  HeldAnswer(const HeldAnswer&) = delete;
  HeldAnswer& operator=(const HeldAnswer&) = delete;
  HeldAnswer(const std::vector<int64_t>& tokens, int start, int end, const py::array& ids,
             const py::array& logits)
      : text(token_ids(tokens)) {
    const TensorView offered = borrow(ids, "i32", "ids"), scores = borrow(logits, "f32", "logits");
    const auto size = static_cast<int>(text.size());
    MEDUSA_CHECK_ARG(start >= 1 && start < end && end <= size, "answer: tokens ", start, " to ",
                     end, " of ", size, " were named");
    const int rows = end - start - 1;
    for (const TensorView& view : {offered, scores}) {
      MEDUSA_CHECK_ARG(view.rank == 3 && view.size(1) == rows && view.size(0) == offered.size(0) &&
                           view.size(2) == offered.size(2),
                       "answer: ids are ", shape_string(offered), ", logits ", shape_string(scores),
                       "; wanted [heads, ", rows, ", width] of both");
    }
    answer = {text,
              start,
              end,
              offered.as<int32_t>(),
              scores.as<float>(),
              static_cast<int>(offered.size(0)),
              static_cast<int>(offered.size(2))};
  }
  std::vector<int32_t> text;
  Answer answer;
};

void check_nodes(const char* name, int max_nodes) {
  MEDUSA_CHECK_ARG(max_nodes >= 1 && max_nodes <= kMaxTreeNodes, name, ": max_nodes is ", max_nodes,
                   ", allowed is 1 to ", kMaxTreeNodes);
}

template <class T>
py::array_t<T> shaped(const std::vector<T>& values, std::vector<int64_t> shape) {
  py::array_t<T> array(std::move(shape));
  std::copy(values.begin(), values.end(), array.mutable_data());
  return array;
}

py::dict judge_answer(const std::shared_ptr<Ngrams>& ngrams, const HeldAnswer& held,
                      bool with_lookup) {
  Judged judged;
  {
    const ReleasedLock release;
    judged = judge(ngrams, held.answer, with_lookup);
  }
  const int64_t rows = held.answer.num_rows(), heads = held.answer.num_heads;
  py::dict found;
  found["log_share"] = shaped(judged.log_share, {rows, heads, judged.num_offers});
  found["gain"] = shaped(judged.gain, {rows, heads, judged.num_offers});
  found["right"] = shaped(judged.right, {rows, heads});
  found["told"] = shaped(judged.told, {rows, heads});
  found["matched"] = shaped(judged.matched, {rows, heads});
  found["found"] = shaped(judged.found, {rows});
  found["kept"] = shaped(judged.kept, {rows});
  return found;
}

}  // namespace

void bind_guesses(py::module_& m) {
  m.attr("LOOKUP_NGRAM") = kLookupNgram;
  m.attr("LOOKUP_AHEAD") = kLookupAhead;
  m.attr("GUESS_CANDIDATES") = kGuessCandidates;

  py::classh<Ngrams>(m, "Ngrams")
      .def(py::init(&make_ngrams), py::kw_only(), py::arg("contexts"), py::arg("counts"),
           py::arg("unseen"), py::arg("tokens"), py::arg("gains"), py::arg("pair_counts"),
           py::arg("pair_unseen"), py::arg("pair_tokens"), py::arg("pair_gains"))
      .def(
          "gain",
          [](const Ngrams& self, int32_t before, int32_t last, int32_t token) {
            return self.after(before, last).gain(token);
          },
          py::arg("before"), py::arg("last"), py::arg("token"))
      .def(
          "frequent",
          [](const Ngrams& self, int32_t before, int32_t last) {
            std::array<int32_t, kFrequent> tokens;
            const int count = self.after(before, last).frequent(tokens);
            return std::vector<int32_t>(tokens.begin(), tokens.begin() + count);
          },
          py::arg("before"), py::arg("last"));

  py::classh<GuessModel>(m, "GuessModel")
      .def(py::init([](const std::vector<HeadWeights>& heads, std::vector<float> chain,
                       std::shared_ptr<Ngrams> ngrams) {
             GuessModel model;
             for (const auto& [head, ngram, rest, lookup] : heads) {
               model.heads.push_back({head, ngram, rest, lookup});
             }
             model.chain = std::move(chain);
             model.ngrams = std::move(ngrams);
             model.check(static_cast<int>(model.heads.size()));
             return model;
           }),
           py::arg("heads"), py::arg("chain"), py::arg("ngrams"));

  m.def(
      "dynamic_drafter",
      [](const std::shared_ptr<Model>& model, const GuessModel& guesses, int max_nodes) {
        return make_dynamic_drafter(model, guesses, max_nodes);
      },
      py::arg("model").none(false), py::arg("guesses"), py::arg("max_nodes"), Release());
  m.def(
      "grow_tree",
      [](const GuessModel& guesses, const std::vector<int64_t>& tokens, const py::array& ids,
         const py::array& logits, int max_nodes, int max_depth) {
        const std::vector<int32_t> text = token_ids(tokens);
        const TensorView offered = borrow(ids, "i32", "ids"),
                         scores = borrow(logits, "f32", "logits");
        MEDUSA_CHECK_ARG(!text.empty() && offered.rank == 2 && scores.rank == 2 &&
                             scores.size(0) == offered.size(0) && scores.size(1) == offered.size(1),
                         "grow_tree: a text of ", text.size(), " tokens, ids ",
                         shape_string(offered), " and logits ", shape_string(scores),
                         " given; wanted [heads, width] of both");
        guesses.check(static_cast<int>(offered.size(0)));
        check_nodes("grow_tree", max_nodes);
        GuessSources from{text,
                          offered.as<int32_t>(),
                          scores.as<float>(),
                          offered.size(1),
                          static_cast<int>(offered.size(1)),
                          static_cast<int>(offered.size(0)),
                          {},
                          nullptr};
        if (!guesses.chain.empty()) from.told = look_up(text);
        DraftTree tree(text.back());
        grow(guesses, from, max_nodes, max_depth, tree);
        std::vector<std::pair<int, int32_t>> nodes;
        for (int node = 1; node < tree.num_nodes(); ++node) {
          nodes.emplace_back(tree.parent(node), tree.token(node));
        }
        return nodes;
      },
      py::arg("guesses"), py::arg("tokens"), py::arg("ids"), py::arg("logits"),
      py::arg("max_nodes"), py::arg("max_depth"));
  m.def(
      "walk_guesses",
      [](const GuessModel& guesses, const std::vector<int64_t>& tokens, int start, int end,
         const py::array& ids, const py::array& logits, int max_nodes) {
        const HeldAnswer held(tokens, start, end, ids, logits);
        guesses.check(held.answer.num_heads);
        check_nodes("walk_guesses", max_nodes);
        const ReleasedLock release;
        return walk(guesses, held.answer, max_nodes);
      },
      py::arg("guesses"), py::arg("tokens"), py::arg("start"), py::arg("end"), py::arg("ids"),
      py::arg("logits"), py::arg("max_nodes"));
  m.def(
      "judge_guesses",
      [](const std::shared_ptr<Ngrams>& ngrams, const std::vector<int64_t>& tokens, int start,
         int end, const py::array& ids, const py::array& logits, bool with_lookup) {
        return judge_answer(ngrams, HeldAnswer(tokens, start, end, ids, logits), with_lookup);
      },
      py::arg("ngrams"), py::arg("tokens"), py::arg("start"), py::arg("end"), py::arg("ids"),
      py::arg("logits"), py::arg("with_lookup"));
}

}  // namespace medusa::python
