// Trees of guessed tokens: their shape (TreeSpec) and one filled with tokens (DraftTree).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace medusa {

constexpr int kMaxTreeNodes = 256;
constexpr int kAncestorWords = kMaxTreeNodes / 64;
using AncestorBits = std::array<uint64_t, kAncestorWords>;  // bit j: sees node j, itself too

// A static tree: each path lists the rank taken at each depth ([[0], [1], [0, 0]]); the root is
// implied. Node 0 is the root, then the paths sorted by (length, path), so parents come before
// children and cutting the tree at a depth or a node count keeps a prefix of the nodes.
class TreeSpec {
 public:
  TreeSpec();  // the root alone
  // ArgumentError on a missing parent, a duplicate, a negative rank, an empty path or more than 256
  // nodes.
  static TreeSpec from_paths(const std::vector<std::vector<int>>& paths);

  int num_nodes() const { return static_cast<int>(parent_.size()); }
  int depth() const { return depth_.back(); }  // of the deepest node; the root alone has 0
  int parent(int node) const { return parent_[static_cast<size_t>(node)]; }
  int rank(int node) const { return rank_[static_cast<size_t>(node)]; }
  int node_depth(int node) const { return depth_[static_cast<size_t>(node)]; }
  int num_ranks(int depth) const;  // 1 + the greatest rank used at this depth (1-based)
  std::vector<std::vector<int>> paths() const;

 private:
  std::vector<int> parent_, rank_, depth_;
};

// One sequence's guesses. Node 0 is the root: already emitted, its KV not yet in the cache. Parents
// come before children; siblings hold distinct tokens and keep the order in which they were added.
class DraftTree {
 public:
  explicit DraftTree(int32_t root_token = 0) { reset(root_token); }
  void reset(int32_t root_token);
  // The new node's index. An existing child with this token is returned instead of a duplicate.
  // ArgumentError if the parent does not exist; InternalError when full (check num_nodes() first).
  int add(int parent, int32_t token);

  int num_nodes() const { return num_nodes_; }
  int32_t token(int node) const { return token_[static_cast<size_t>(node)]; }
  int parent(int node) const { return parent_[static_cast<size_t>(node)]; }  // -1 at the root
  int depth(int node) const { return depth_[static_cast<size_t>(node)]; }    // 0 at the root
  int first_child(int node) const { return first_child_[static_cast<size_t>(node)]; }    // -1: none
  int next_sibling(int node) const { return next_sibling_[static_cast<size_t>(node)]; }  // -1: none
  const AncestorBits& ancestors(int node) const { return ancestors_[static_cast<size_t>(node)]; }
  int find_child(int node, int32_t token) const;  // -1: none

 private:
  int num_nodes_ = 0;
  std::array<int32_t, kMaxTreeNodes> token_;
  std::array<int16_t, kMaxTreeNodes> parent_, depth_, first_child_, last_child_, next_sibling_;
  std::array<AncestorBits, kMaxTreeNodes> ancestors_;
};

}  // namespace medusa
