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

template <class T>
v05::Buffer buffer(std::vector<T>& values, v05::Dtype dtype) {
  return {.data = values.data(), .dtype = dtype, .size = values.size()};
}

template <class Real>
constexpr v05::Dtype kReal = sizeof(Real) == sizeof(float) ? v05::Dtype::kFloat32 : v05::Dtype::kFloat64;

// Computes padded advantages and statistics from token rewards.
template <class Real, class Mask>
void run(v05::Dtype mask_dtype, v05::Baseline baseline, bool leave_one_out, v05::Scale scale) {
  constexpr std::size_t kRows = 211;
  constexpr std::size_t kTokens = 75;  // not a multiple of any vector's length
  constexpr std::int64_t kGroups = 50;
  std::mt19937_64 random(0);
  std::vector<Real> tokens(kRows * kTokens);
  std::vector<Mask> mask(tokens.size());
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    tokens[i] = static_cast<Real>(static_cast<double>(random()) * 0x1p-64 / kTokens);
    mask[i] = static_cast<Mask>(random() % 3 != 0);
  }
  std::vector<double> energy(kRows);
  for (double& of_row : energy) {
    of_row = static_cast<double>(random()) * 0x1p-64;
  }
  std::vector<std::int64_t> offsets(kGroups + 1, kRows);
  for (std::int64_t g = 0; g < kGroups; ++g) {
    offsets[static_cast<std::size_t>(g)] = g * 4;
  }
  const std::vector<double> prior(kGroups, 0.4);
  const v05::Options options{.baseline = baseline, .scale = scale, .leave_one_out = leave_one_out};
  v05::Rollouts rollouts;
  rollouts.rewards = buffer(tokens, kReal<Real>);
  rollouts.mask = buffer(mask, mask_dtype);
  rollouts.energy = energy;
  rollouts.count = kRows;
  rollouts.by_token = true;
  std::vector<Real> advantages(tokens.size());
  std::vector<double> table(v05::kStatistics.size() * kGroups);
  v05::compute_advantages(rollouts, v05::Groups{.offsets = offsets, .ids = {}, .count = kGroups}, prior, options,
                       buffer(advantages, kReal<Real>), v05::Table{.data = table.data(), .groups = kGroups}, 1);
  add(advantages);
  add(table);
}

}  // namespace

int main() {
  using enum v05::Dtype;
  for (const v05::Scale scale : {v05::Scale::kNone, v05::Scale::kGroup, v05::Scale::kBatch}) {
    run<float, std::uint8_t>(kBytes, v05::Baseline::kShrinkage, false, scale);
    run<float, std::int64_t>(kInt64, v05::Baseline::kShrinkage, false, scale);
    run<float, float>(kFloat32, v05::Baseline::kShrinkage, false, scale);
    run<double, std::uint8_t>(kBytes, v05::Baseline::kShrinkage, false, scale);
    run<double, std::int64_t>(kInt64, v05::Baseline::kShrinkage, false, scale);
    run<double, float>(kFloat32, v05::Baseline::kShrinkage, false, scale);
    for (const bool leave_one_out : {false, true}) {
      run<double, float>(kFloat32, v05::Baseline::kCalibrated, leave_one_out, scale);
      run<double, float>(kFloat32, v05::Baseline::kEnergyMean, leave_one_out, scale);
      run<double, float>(kFloat32, v05::Baseline::kBatchMean, leave_one_out, scale);
    }
  }
  std::printf("%016llx\n", static_cast<unsigned long long>(hash));
}
