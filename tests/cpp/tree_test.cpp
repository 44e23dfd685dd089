// TreeSpec and DraftTree: order of nodes, links, ancestors, and what they refuse.
// SPDX-License-Identifier: Apache-2.0
#include "medusa/tree.h"

#include <random>
#include <set>
#include <utility>

#include "check.h"
#include "medusa/error.h"

using medusa::ArgumentError;
using medusa::DraftTree;
using medusa::TreeSpec;

TEST(spec_sorts_by_length_then_path) {
  const TreeSpec tree = TreeSpec::from_paths({{1}, {0, 2}, {0}, {1, 0}, {0, 2, 0}});
  CHECK(tree.num_nodes() == 6);
  CHECK(tree.depth() == 3);
  CHECK((tree.paths() == std::vector<std::vector<int>>{{0}, {1}, {0, 2}, {1, 0}, {0, 2, 0}}));
  const int parents[] = {-1, 0, 0, 1, 2, 3};
  const int depths[] = {0, 1, 1, 2, 2, 3};
  for (int v = 0; v < 6; ++v) {
    CHECK(tree.parent(v) == parents[v]);
    CHECK(tree.node_depth(v) == depths[v]);
  }
  CHECK(tree.num_ranks(1) == 2);
  CHECK(tree.num_ranks(2) == 3);
  CHECK(tree.num_ranks(3) == 1);
  CHECK(tree.num_ranks(4) == 0);
}

TEST(spec_without_paths_is_the_root) {
  const TreeSpec tree = TreeSpec::from_paths({});
  CHECK(tree.num_nodes() == 1);
  CHECK(tree.depth() == 0);
}

TEST(spec_refuses_what_is_no_tree) {
  CHECK_THROWS(ArgumentError, "[0, 1]", TreeSpec::from_paths({{0}, {0, 1, 0}}));
  CHECK_THROWS(ArgumentError, "[0]", TreeSpec::from_paths({{0}, {0}}));
  CHECK_THROWS(ArgumentError, "-1", TreeSpec::from_paths({{0}, {-1}}));
  CHECK_THROWS(ArgumentError, "[]", TreeSpec::from_paths({{}}));
  std::vector<std::vector<int>> wide;
  for (int rank = 0; rank < 255; ++rank) wide.push_back({rank});
  CHECK(TreeSpec::from_paths(wide).num_nodes() == 256);
  wide.push_back({255});
  CHECK_THROWS(ArgumentError, "256", TreeSpec::from_paths(wide));
}

TEST(draft_tree_links_agree_with_a_plain_list) {
  std::mt19937 random(7);
  for (int round = 0; round < 200; ++round) {
    DraftTree tree(5);
    std::vector<std::pair<int, int32_t>> nodes{{-1, 5}};  // parent, token
    for (int attempt = 0; attempt < 300 && tree.num_nodes() < medusa::kMaxTreeNodes; ++attempt) {
      const auto parent = static_cast<int>(random() % nodes.size());
      const auto token = static_cast<int32_t>(random() % 4);
      int known = -1;
      for (size_t v = 1; v < nodes.size(); ++v) {
        if (nodes[v] == std::pair(parent, token)) known = static_cast<int>(v);
      }
      CHECK(tree.find_child(parent, token) == known);
      const int node = tree.add(parent, token);
      CHECK(node == (known >= 0 ? known : static_cast<int>(nodes.size())));
      if (known < 0) nodes.emplace_back(parent, token);
    }
    CHECK(tree.num_nodes() == static_cast<int>(nodes.size()));
    for (int v = 0; v < tree.num_nodes(); ++v) {
      CHECK(tree.token(v) == nodes[static_cast<size_t>(v)].second);
      std::set<int> ancestors;
      for (int a = v; a >= 0; a = nodes[static_cast<size_t>(a)].first) ancestors.insert(a);
      CHECK(tree.depth(v) == static_cast<int>(ancestors.size()) - 1);
      for (int j = 0; j < medusa::kMaxTreeNodes; ++j) {
        const bool bit = tree.ancestors(v)[static_cast<size_t>(j / 64)] >> (j % 64) & 1;
        CHECK(bit == ancestors.contains(j));
      }
      int last = -1;  // children in the order in which they were added
      for (int c = tree.first_child(v); c >= 0; c = tree.next_sibling(c)) {
        CHECK(nodes[static_cast<size_t>(c)].first == v);
        CHECK(c > last);
        last = c;
      }
    }
  }
}

TEST(draft_tree_refuses) {
  DraftTree tree(0);
  CHECK_THROWS(ArgumentError, "parent", tree.add(1, 3));
  CHECK_THROWS(ArgumentError, "parent", tree.add(-1, 3));
  for (int32_t token = 1; token < medusa::kMaxTreeNodes; ++token) tree.add(0, token);
  CHECK_THROWS(medusa::InternalError, "", tree.add(0, 9999));
  CHECK(tree.add(0, 7) == 7);
  tree.reset(3);
  CHECK(tree.num_nodes() == 1 && tree.token(0) == 3 && tree.first_child(0) == -1);
}
