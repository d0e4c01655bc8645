// Prints the bits that the op computes for fixed input. Built for one instruction set at a time by test_core.py.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <span>
#include <vector>

#include "v05/advantage.hpp"

namespace {

std::uint64_t hash = 0xcbf29ce484222325U;

template <class T>
void add(const std::vector<T>& values) {
  std::vector<unsigned char> bytes(values.size() * sizeof(T));
  std::memcpy(bytes.data(), values.data(), bytes.size());
  for (const unsigned char byte : bytes) {
    hash = (hash ^ byte) * 0x100000001b3U;
  }
}

template <class Real, class Mask>
void run(v05::Baseline baseline, bool leave_one_out, v05::Scale scale) {
  constexpr std::size_t kRows = 211;
  constexpr std::size_t kTokens = 75;  // no multiple of any vector
  constexpr std::int64_t kGroups = 50;
  std::mt19937_64 random(0);
  std::vector<Real> tokens(kRows * kTokens);
  std::vector<Mask> mask(tokens.size());
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    tokens[i] = static_cast<Real>(static_cast<double>(random()) * 0x1p-64 / kTokens);
    mask[i] = static_cast<Mask>(random() % 3 != 0);
  }
  std::vector<std::int64_t> offsets(kGroups + 1, kRows);
  for (std::int64_t g = 0; g < kGroups; ++g) {
    offsets[static_cast<std::size_t>(g)] = g * 4;
  }
  const std::vector<double> prior(kGroups, 0.4);
  const v05::AdvantageRule rule{.baseline = baseline, .scale = scale, .leave_one_out = leave_one_out};
  std::vector<double> outcomes(kRows);
  v05::sum_tokens(std::span<const Real>(tokens), mask.data(), std::span<double>(outcomes), 1);
  std::vector<double> advantages(kRows);
  v05::compute_advantages(v05::Rollouts<double>{.rewards = outcomes, .valid = {}, .trajectory_ids = {}},
                          v05::Groups{.offsets = offsets, .ids = {}, .count = kGroups}, std::span<const double>(prior),
                          rule, std::span<double>(advantages), v05::StatisticsOut{}, 1);
  std::vector<Real> spread(tokens.size());
  const std::vector<Real> rounded(advantages.begin(), advantages.end());
  v05::spread_padded(std::span<const Real>(rounded), mask.data(), std::span<Real>(spread), 1);
  add(outcomes);
  add(advantages);
  add(spread);
}

}  // namespace

int main() {
  constexpr auto kShrinkage = v05::Baseline::kShrinkage;
  for (const v05::Scale scale : {v05::Scale::kNone, v05::Scale::kGroup, v05::Scale::kBatch}) {
    run<float, std::uint8_t>(kShrinkage, false, scale);
    run<float, std::int64_t>(kShrinkage, false, scale);
    run<float, float>(kShrinkage, false, scale);
    run<double, std::uint8_t>(kShrinkage, false, scale);
    run<double, std::int64_t>(kShrinkage, false, scale);
    run<double, float>(kShrinkage, false, scale);
    run<double, float>(v05::Baseline::kCalibrated, false, scale);
    run<double, float>(v05::Baseline::kCalibrated, true, scale);
  }
  std::printf("%016llx\n", static_cast<unsigned long long>(hash));
}
