// Sums token rewards to outcomes, and spreads the advantages of rollouts over tokens.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "v05/advantage.hpp"

namespace v05 {

// Returns the N sums of (N, T) token rewards over the tokens whose mask is 1. The mask is not checked.
std::vector<double> sum_tokens(const Buffer& rewards, const Buffer& mask, std::size_t rows, int threads);

// Writes N advantages in the layout of the rollouts: (N, T), with 0 where the mask is 0, or packed. It checks the mask
// while it reads it, so `out` has been written when it throws the error of check_mask.
template <class Out>
void spread_tokens(std::span<const Out> advantages, const Rollouts& rollouts, std::span<Out> out, int threads);

}  // namespace v05
