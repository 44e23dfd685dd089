// SPDX-License-Identifier: Apache-2.0
#include "medusa/tree.h"

#include <algorithm>
#include <map>
#include <string>

#include "medusa/error.h"

namespace medusa {
namespace {

using Path = std::vector<int>;

std::string path_string(const Path& path) {
  std::string out = "[";
  for (size_t i = 0; i < path.size(); ++i) {
    out += (i == 0 ? "" : ", ") + std::to_string(path[i]);
  }
  return out + "]";
}

}  // namespace

TreeSpec::TreeSpec() : parent_{-1}, rank_{-1}, depth_{0} {}

TreeSpec TreeSpec::from_paths(const std::vector<std::vector<int>>& paths) {
  MEDUSA_CHECK_ARG(paths.size() < kMaxTreeNodes, "tree: ", paths.size(), " paths, at most ",
                   kMaxTreeNodes - 1, " are allowed (", kMaxTreeNodes, " nodes with the root)");
  std::vector<Path> sorted = paths;
  std::sort(sorted.begin(), sorted.end(), [](const Path& a, const Path& b) {
    return a.size() != b.size() ? a.size() < b.size() : a < b;
  });

  TreeSpec tree;
  std::map<Path, int> node_of{{Path{}, 0}};
  for (const Path& path : sorted) {
    // Before anything is printed: a path that long has no complete line of parents anyway.
    MEDUSA_CHECK_ARG(path.size() < kMaxTreeNodes, "tree: a path of ", path.size(),
                     " ranks, at most ", kMaxTreeNodes - 1, " are allowed");
    MEDUSA_CHECK_ARG(!path.empty(), "tree: path [] is the root, which is implied; leave it out");
    for (const int rank : path) {
      MEDUSA_CHECK_ARG(rank >= 0, "tree: path ", path_string(path), " has rank ", rank,
                       "; ranks start at 0");
    }
    const Path parent_path(path.begin(), path.end() - 1);
    const auto parent = node_of.find(parent_path);
    MEDUSA_CHECK_ARG(parent != node_of.end(), "tree: path ", path_string(path),
                     " needs its parent ", path_string(parent_path), ", which is not listed");
    const bool is_new = node_of.emplace(path, tree.num_nodes()).second;
    MEDUSA_CHECK_ARG(is_new, "tree: path ", path_string(path), " is listed twice");
    tree.parent_.push_back(parent->second);
    tree.rank_.push_back(path.back());
    tree.depth_.push_back(static_cast<int>(path.size()));
  }
  return tree;
}

int TreeSpec::num_ranks(int depth) const {
  int num = 0;
  for (int node = 1; node < num_nodes(); ++node) {
    if (node_depth(node) == depth) num = std::max(num, rank(node) + 1);
  }
  return num;
}

std::vector<std::vector<int>> TreeSpec::paths() const {
  std::vector<Path> all(1);  // the root's path is empty
  for (int node = 1; node < num_nodes(); ++node) {
    Path path = all[static_cast<size_t>(parent(node))];
    path.push_back(rank(node));
    all.push_back(std::move(path));
  }
  all.erase(all.begin());
  return all;
}

void DraftTree::reset(int32_t root_token) {
  num_nodes_ = 1;
  token_[0] = root_token;
  parent_[0] = first_child_[0] = last_child_[0] = next_sibling_[0] = -1;
  depth_[0] = 0;
  ancestors_[0] = {1};
}

int DraftTree::add(int parent, int32_t token) {
  MEDUSA_CHECK_ARG(parent >= 0 && parent < num_nodes_, "DraftTree: parent ", parent,
                   " does not exist; the tree has ", num_nodes_, " nodes");
  if (const int child = find_child(parent, token); child >= 0) return child;
  MEDUSA_CHECK_INTERNAL(num_nodes_ < kMaxTreeNodes, "DraftTree: more than ", kMaxTreeNodes,
                        " nodes");

  const auto p = static_cast<size_t>(parent), node = static_cast<size_t>(num_nodes_++);
  const auto link = static_cast<int16_t>(node);
  token_[node] = token;
  parent_[node] = static_cast<int16_t>(parent);
  depth_[node] = static_cast<int16_t>(depth_[p] + 1);
  first_child_[node] = last_child_[node] = next_sibling_[node] = -1;
  ancestors_[node] = ancestors_[p];
  ancestors_[node][node / 64] |= uint64_t{1} << (node % 64);

  if (last_child_[p] < 0) {
    first_child_[p] = link;
  } else {
    next_sibling_[static_cast<size_t>(last_child_[p])] = link;
  }
  last_child_[p] = link;
  return static_cast<int>(node);
}

int DraftTree::find_child(int node, int32_t token) const {
  int child = first_child(node);
  while (child >= 0 && this->token(child) != token) child = next_sibling(child);
  return child;
}

}  // namespace medusa
