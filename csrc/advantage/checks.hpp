// What is refused before anything is computed: std::invalid_argument that names the argument, the rows and the remedy.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "v05/advantage.hpp"

namespace v05 {

// Offsets of parts that lie one after another from 0 on, to `end` where it is known.
void check_offsets(const std::string& name, std::span<const std::int64_t> offsets, std::optional<std::int64_t> end);

// Priors outside the reward range.
void check_prior(std::span<const double> prior, const Options& options);

// Energies that are negative or not finite, in rows that are valid.
void check_energy(std::span<const double> energy, std::span<const std::uint8_t> valid);

// Complains about rewards as the options say, and returns whether all valid ones are finite.
template <class Real>
bool check_rewards(const Outcomes<Real>& outcomes, const Options& options);

// Rows of an (N, T) mask that hold anything but 0 and 1.
void check_mask(const Buffer& mask, std::size_t rows);

}  // namespace v05
