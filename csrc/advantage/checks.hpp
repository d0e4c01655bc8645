// Checks of the arguments. They throw std::invalid_argument, which names the argument, the rows and the remedy.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "v05/advantage.hpp"

namespace v05 {

// Throws unless the offsets start at 0, never decrease, and end at `end`, if that is given.
void check_offsets(const std::string& name, std::span<const std::int64_t> offsets, std::optional<std::int64_t> end);

// Throws if a prior is outside the reward range.
void check_prior(std::span<const double> prior, const Options& options);

// Throws if the energy of a valid row is negative or not finite.
void check_energy(std::span<const double> energy, std::span<const std::uint8_t> valid);

// Throws for rewards that the options do not allow. Returns whether all valid rewards are finite.
template <class Real>
bool check_rewards(const Outcomes<Real>& outcomes, const Options& options);

// Throws if an (N, T) mask has values other than 0 and 1.
void check_mask(const Buffer& mask, std::size_t rows);

}  // namespace v05
