// Where the end of a text stood before: what followed there is a guess at what follows here.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>

namespace medusa {

struct Match {
  int length = 0;  // tokens before `next` that equal the end of the text; 0: there is none
  int next = 0;    // index of the token that followed
};

// The longest match of up to max_ngram tokens, of equals the latest. Reads the whole text: some 2
// us a thousand tokens.
Match latest_match(std::span<const int32_t> text, int max_ngram);

}  // namespace medusa
