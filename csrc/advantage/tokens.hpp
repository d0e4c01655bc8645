// From token rewards to outcomes, and from the advantages of rollouts to those of tokens.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "v05/advantage.hpp"

namespace v05 {

// (N, T) token rewards to N outcomes: sums over the tokens whose mask is 1. The mask is not checked.
std::vector<double> sum_tokens(const Buffer& rewards, const Buffer& mask, std::size_t rows, int threads);

// N advantages to the layout of the rollouts: (N, T), 0 where the mask is, or packed. What it reads of a mask it
// checks, so that `out` is written when it throws what check_mask does.
template <class Out>
void spread_tokens(std::span<const Out> advantages, const Rollouts& rollouts, std::span<Out> out, int threads);

}  // namespace v05
