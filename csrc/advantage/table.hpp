// Writes the statistics of a group into the table.
#pragma once

#include <cstddef>
#include <cstdint>

#include "judge.hpp"

namespace v05 {

template <class GroupKind>
void write_moments(const Table& table, std::size_t g, const GroupKind& group, const Options& options) {
  table.at(Statistic::kCount, g) = static_cast<double>(group.moments.count);
  table.at(Statistic::kNonfinite, g) = 0.0;  // they are counted later
  table.at(Statistic::kClipped, g) = 0.0;
  table.at(Statistic::kMean, g) = group.moments.mean;
  table.at(Statistic::kVar, g) = group.moments.variance();
  table.at(Statistic::kBaseline, g) = group.baseline(options);
}

template <bool kReadsEnergy, bool kReadsBatch>
void write_statistics(const Table& table, std::size_t g, const Group<kReadsEnergy, kReadsBatch>& group,
                      const Options& options) {
  const Moments& m = group.moments;
  write_moments(table, g, group, options);
  if (options.baseline == Baseline::kShrinkage) {
    const Fusion fusion = shrinkage(m.count, m.mean, group.known.prior, options.half_range());
    table.at(Statistic::kMse, g) = fusion.mse;
    table.at(Statistic::kWeight, g) = fusion.weight;
    table.at(Statistic::kStatistic, g) = fusion.statistic;
    table.at(Statistic::kTakeMore, g) =
        osla_take_more(m.count, fusion.squared_bias, options.max_rollouts, options.cost) ? 1.0 : 0.0;
  }
}

inline void write_statistics(const Table& table, std::size_t g, const CalibratedGroup& group, const Options& options) {
  write_moments(table, g, group, options);
  table.at(Statistic::kMse, g) = group.fusion.variance * (options.high - options.low) * (options.high - options.low);
  table.at(Statistic::kHallucination, g) = group.fusion.hallucination;
  const std::int64_t count = group.moments.count;
  const bool more =
      options.baseline == Baseline::kLeastVariance
          ? variance_take_more(count, group.fusion, options.calibration, options.max_rollouts, options.cost)
          : calibrated_take_more(count, group.fusion, options.max_rollouts, options.cost);
  table.at(Statistic::kTakeMore, g) = more ? 1.0 : 0.0;
}

}  // namespace v05
