// The kernels between two passes: a line's way through steps whose walk is written by hand.
// SPDX-License-Identifier: Apache-2.0
#include "backend/cuda/step_state.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "check.h"
#include "medusa/noise.h"

using namespace medusa;        // NOLINT(google-build-using-namespace)
using namespace medusa::cuda;  // NOLINT(google-build-using-namespace)

namespace {

constexpr int kHidden = 5, kVocab = 100;

template <class T>
std::vector<T> read(const Stream& stream, const T* from, size_t count) {
  std::vector<T> values(count);
  CUDA_CHECK(cudaMemcpyAsync(values.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost,
                             stream.get()));
  stream.synchronize();
  return values;
}

template <class T>
void write(const Stream& stream, T* to, const std::vector<T>& values) {
  CUDA_CHECK(cudaMemcpyAsync(to, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice,
                             stream.get()));
  stream.synchronize();
}

// Root, two children, two grandchildren under the first and one under the second, one more level.
TreeSpec spec() { return TreeSpec::from_paths({{0}, {1}, {0, 0}, {0, 2}, {1, 0}, {0, 0, 1}}); }

struct Fixture {
  Fixture() : stream(0), state(shape(), staging, stream.get()), ring(3, 4, spec().num_nodes()) {}
  static ResidentShape shape() {
    ResidentShape shape;
    shape.max_lines = 4;
    shape.hidden_size = kHidden;
    shape.vocab_size = kVocab;
    shape.tree = spec();
    return shape;
  }

  // Hidden rows are 100 * line + column.
  void start(int line, const std::vector<int32_t>& tokens, int remaining,
             const SamplingParams& sampling) {
    std::vector<float> hidden(kHidden);
    std::iota(hidden.begin(), hidden.end(), 100.0f * static_cast<float>(line));
    const std::vector<int32_t> ends{7, 9};
    ResidentLine start;
    start.line = line;
    start.prompt_len = static_cast<int>(tokens.size()) - 1;
    start.remaining = remaining;
    start.tokens = tokens;
    start.sampling = &sampling;
    start.eos_ids = ends;
    start.hidden = hidden.data();
    start_line(state.view(), start, staging, stream.get());
  }

  Stream stream;
  Staging staging;
  OwnedStepState state;
  PinnedRing ring;
};

}  // namespace

TEST(rows_are_those_of_the_tree_where_a_line_lives) {
  Fixture f;
  const StepState& state = f.state.view();
  const int N = spec().num_nodes();
  SamplingParams greedy;
  f.start(2, {5, 6, 8, 11}, 50, greedy);
  f.start(0, {1, 2}, 2, greedy);          // room for the root and its children
  const std::vector<int> lines{2, 0, 3};  // line 3 was never started
  set_lines(state, lines, f.staging, f.stream.get());

  const TensorView hidden = gather_hidden(state, 2, f.stream.get());
  const std::vector<float> rows_hidden = read(f.stream, hidden.as<float>(), 2 * kHidden);
  CHECK(rows_hidden[0] == 200.0f && rows_hidden[kHidden - 1] == 204.0f);
  CHECK(rows_hidden[kHidden] == 0.0f);

  std::vector<int32_t> tokens(static_cast<size_t>(4 * N));
  std::iota(tokens.begin(), tokens.end(), 20);
  write(f.stream, state.tree_tokens, tokens);
  build_rows(state, 3, f.stream.get());
  const Rows rows = state.pass_rows(3).rows;
  const auto num_rows = static_cast<size_t>(rows.num_rows);
  CHECK(rows.num_rows == 3 * N);
  const auto token = read(f.stream, rows.token, num_rows);
  const auto sequence = read(f.stream, rows.sequence, num_rows);
  const auto position = read(f.stream, rows.position, num_rows);
  const auto slot = read(f.stream, rows.slot, num_rows);
  const auto prefix_len = read(f.stream, rows.prefix_len, num_rows);
  const auto ancestors = read(f.stream, rows.ancestors, num_rows);
  const auto index = read(f.stream, state.row_index, num_rows);
  const auto trees = read(f.stream, state.trees, 3);
  CHECK(trees[0].num_nodes == N && trees[1].num_nodes == 3 && trees[2].num_nodes == 0);
  CHECK(trees[1].first_row == N);
  const int lens[] = {3, 1, 0};
  const int32_t roots[] = {11, 2, -1};
  const int lives[] = {N, 3, 0};
  for (int row = 0; row < rows.num_rows; ++row) {
    const int b = row / N, node = row % N;
    const auto i = static_cast<size_t>(row);
    CHECK(index[i] == row);
    if (node >= lives[b]) {
      CHECK(sequence[i] == -1 && prefix_len[i] == 0 && ancestors[i] == AncestorBits{});
      CHECK(token[i] == 0 && position[i] == 0 && slot[i] == 0);
      continue;
    }
    CHECK(sequence[i] == lines[static_cast<size_t>(b)]);
    CHECK(position[i] == lens[b] + spec().node_depth(node));
    CHECK(slot[i] == lens[b] + node && prefix_len[i] == lens[b]);
    CHECK(token[i] == (node == 0 ? roots[b] : 20 + row));
    uint64_t bits = 0;
    for (int v = node; v >= 0; v = spec().parent(v)) bits |= uint64_t{1} << v;
    CHECK(ancestors[i] == AncestorBits{bits});
  }
}

TEST(candidates_fill_the_tree_by_depth_and_rank) {
  Fixture f;
  const StepState& state = f.state.view();
  const TreeSpec tree = spec();
  const int N = tree.num_nodes(), width = 40, batch = 3;
  SamplingParams greedy, sampled, typical;
  sampled.temperature = 0.7f;
  sampled.seed = 12345678901234ull;
  sampled.sample_index = 3;
  typical.temperature = 0.7f;
  typical.acceptance = Acceptance::typical;
  f.start(0, {1, 2}, 50, greedy);
  f.start(1, {1, 2, 3}, 50, sampled);
  f.start(3, {1}, 50, typical);
  const std::vector<int> lines{1, 3, 0};
  set_lines(state, lines, f.staging, f.stream.get());

  const int num_rows = tree.depth() * batch;
  std::mt19937 random(3);
  std::vector<int32_t> ids(static_cast<size_t>(num_rows * width)), map(60);
  std::vector<float> values(ids.size());
  for (int row = 0; row < num_rows; ++row) {
    std::vector<int32_t> all(60);
    std::iota(all.begin(), all.end(), 0);
    std::shuffle(all.begin(), all.end(), random);
    for (int i = 0; i < width; ++i) {
      const auto at = static_cast<size_t>(row * width + i);
      ids[at] = all[static_cast<size_t>(i)];
      values[at] = 3.0f - 0.1f * static_cast<float>(i / 2);  // ties, which noise breaks
      if (row == batch) values[at] = -INFINITY;              // ties that no noise breaks
    }
  }
  for (size_t i = 0; i < map.size(); ++i) map[i] = static_cast<int32_t>(99 - i);
  DeviceBuffer memory(static_cast<int64_t>(ids.size() * 8 + map.size() * 4));
  auto* device_ids = static_cast<int32_t*>(memory.data());
  auto* device_values = reinterpret_cast<float*>(device_ids + ids.size());
  auto* device_map = reinterpret_cast<int32_t*>(device_values + ids.size());
  write(f.stream, device_ids, ids);
  write(f.stream, device_values, values);
  write(f.stream, device_map, map);

  int reordered = 0;
  for (const bool mapped : {false, true}) {
    fill_tree(state, batch, {device_ids, DType::i32, num_rows, width},
              {device_values, DType::f32, num_rows, width},
              mapped ? TensorView(device_map, DType::i32, 60) : TensorView(), f.stream.get());
    const auto got = read(f.stream, state.tree_tokens, static_cast<size_t>(batch * N));
    for (int b = 0; b < batch; ++b) {
      for (int node = 1; node < N; ++node) {
        const int level = tree.node_depth(node);
        const auto first = static_cast<size_t>(((level - 1) * batch + b) * width);
        std::vector<std::pair<float, int32_t>> ranked;
        for (size_t i = first; i < first + width; ++i) {
          const int32_t id = mapped ? map[static_cast<size_t>(ids[i])] : ids[i];
          float score = values[i];
          if (b == 0) {  // the sampled line: 2 committed tokens
            const auto position = static_cast<uint32_t>(2 + level);
            score = score / sampled.temperature +
                    gumbel_from_bits(noise_word(sampled.seed, sampled.sample_index, position,
                                                static_cast<uint32_t>(id)));
          }
          ranked.emplace_back(score, id);
        }
        const int32_t plain = ranked[static_cast<size_t>(tree.rank(node))].second;
        std::stable_sort(ranked.begin(), ranked.end(),
                         [](const auto& x, const auto& y) { return x.first > y.first; });
        const int32_t want = ranked[static_cast<size_t>(tree.rank(node))].second;
        CHECK(got[static_cast<size_t>(b * N + node)] == want);
        reordered += b == 0 && want != plain;
      }
    }
  }
  CHECK(reordered > 2);
}

TEST(a_line_advances_ends_and_is_published) {
  Fixture f;
  const StepState& state = f.state.view();
  const int N = spec().num_nodes();
  SamplingParams greedy;
  f.start(1, {40, 41, 33, 33}, 6, greedy);
  f.start(2, {50, 51}, 3, greedy);
  const std::vector<int> lines{2, 1, 0};
  set_lines(state, lines, f.staging, f.stream.get());
  const auto history = read(f.stream, state.history + state.history_words, 4);
  CHECK(history[0] == 0 && history[1] == (1u << 8 | 1u << 9 | 1u << 1) && history[2] == 0);
  const auto eos = read(f.stream, state.eos_ids + kMaxResidentEos, 2);
  CHECK(eos[0] == 7 && eos[1] == 9);
  const auto params = read(f.stream, state.params, 3);
  CHECK(params[1].first_eos == kMaxResidentEos && params[1].num_eos == 2);

  std::vector<float> hidden(static_cast<size_t>(3 * N * kHidden));
  std::iota(hidden.begin(), hidden.end(), 1000.0f);
  DeviceBuffer memory(static_cast<int64_t>(hidden.size() * 4));
  auto* device_hidden = static_cast<float*>(memory.data());
  write(f.stream, device_hidden, hidden);

  const auto step = [&](const std::vector<WalkResult>& results, const std::vector<int32_t>& path,
                        const std::vector<int32_t>& tokens) {
    build_rows(state, 3, f.stream.get());
    write(f.stream, state.results, results);
    write(f.stream, state.path, path);
    write(f.stream, state.path_tokens, tokens);
    advance(state, 3, f.stream.get());
    keep_hidden(state, 3, {device_hidden, DType::f32, 3 * N, kHidden}, f.stream.get());
    publish(state, 3, f.ring.view(), f.stream.get());
    f.stream.synchronize();
  };
  std::vector<int32_t> path(static_cast<size_t>(3 * N)), tokens(path.size());
  const auto n = static_cast<size_t>(N);
  path[0] = 0, tokens[0] = 60;
  path[n] = 0, path[n + 1] = 2, path[n + 2] = 5;
  tokens[n] = 70, tokens[n + 1] = 71, tokens[n + 2] = 72;
  const WalkResult idle{WalkStatus::idle, 0, -1, -1, 0};

  CHECK(!f.ring.has(0));
  step({{WalkStatus::goes_on, 1, 60, 0, 0}, {WalkStatus::goes_on, 3, 72, 5, 0}, idle}, path,
       tokens);
  const DeviceMoves moves = state.moves(3);
  CHECK(moves.num_lines == 3 && moves.max_path == N);
  const auto len_before = read(f.stream, moves.len, 3);
  CHECK(len_before[0] == 1 && len_before[1] == 3);
  const auto n_of = read(f.stream, moves.n, static_cast<size_t>(moves.n_stride) + 1);
  CHECK(n_of[0] == 1 && n_of[static_cast<size_t>(moves.n_stride)] == 3);
  auto len = read(f.stream, state.len, 4), root = read(f.stream, state.root, 4);
  auto states = read(f.stream, state.states, 4);
  CHECK(len[2] == 2 && root[2] == 60 && states[2].remaining == 2 && states[2].position == 3);
  CHECK(len[1] == 6 && root[1] == 72 && states[1].remaining == 3 && states[1].position == 7);
  CHECK(f.ring.has(0) && !f.ring.has(1));
  const PinnedRing::Row first = f.ring.row(0, 1);
  CHECK((std::vector<int32_t>(first.path.begin(), first.path.end()) ==
         std::vector<int32_t>{0, 2, 5}));
  CHECK((std::vector<int32_t>(first.tokens.begin(), first.tokens.end()) ==
         std::vector<int32_t>{70, 71, 72}));
  CHECK(f.ring.row(0, 2).result.status == WalkStatus::idle && f.ring.row(0, 2).tokens.empty());
  auto kept = read(f.stream, state.hidden, 4 * kHidden);
  CHECK(kept[2 * kHidden] == hidden[0]);
  CHECK(kept[kHidden] == hidden[(n + 5) * kHidden]);

  // One line ends with its text, the other breaks before it emitted anything.
  step({{WalkStatus::end_of_text, 1, 7, 0, 0}, {WalkStatus::broken, 0, -1, -1, 7}, idle}, path,
       tokens);
  const auto active = read(f.stream, state.active, 4);
  CHECK(active == (std::vector<int32_t>{0, 0, 0, 0}));
  const StepTimes times = f.ring.times(0), next = f.ring.times(1);
  CHECK(times.began > 0 && times.began <= times.ended);
  CHECK(times.ended <= next.began && next.began <= next.ended);
  CHECK(f.ring.row(1, 1).result.status == WalkStatus::broken);
  CHECK(f.ring.row(1, 1).result.broken_position == 7 && f.ring.row(1, 1).tokens.empty());
  const auto same = read(f.stream, state.hidden, 4 * kHidden);
  CHECK(same[kHidden] == kept[kHidden]);

  // From then on nothing moves, however often the ring goes round; a new text takes the line.
  for (uint64_t i = 2; i < 8; ++i) {
    build_rows(state, 3, f.stream.get());
    const auto trees = read(f.stream, state.trees, 3);
    CHECK(trees[0].num_nodes == 0 && trees[1].num_nodes == 0);
    advance(state, 3, f.stream.get());
    publish(state, 3, f.ring.view(), f.stream.get());
    f.stream.synchronize();
    CHECK(f.ring.has(i) && !f.ring.has(i + 1) && !f.ring.has(i - 3 + 8));
    CHECK(f.ring.row(i, 0).result.status == WalkStatus::idle);
  }
  f.start(2, {1, 2, 3}, 1, greedy);
  build_rows(state, 3, f.stream.get());
  const auto trees = read(f.stream, state.trees, 3);
  CHECK(trees[0].num_nodes == 1 && trees[1].num_nodes == 0);
}
