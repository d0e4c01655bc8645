#include "lanes.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "v05/grouping.hpp"
#include "v05/multiversion.hpp"

namespace v05 {
namespace {

// A 256-bit register of double, or two smaller registers. 512 bits would be faster with AVX-512, and slower without it,
// because the compiler makes scalar code of vectors that do not fit a register.
constexpr std::size_t kAbreast = 4;
template <class Value>
using LanesOf [[gnu::vector_size(kAbreast * sizeof(Value))]] = Value;
using Lanes = LanesOf<double>;

// The part of the options that the lanes read.
struct Task {
  bool shrinks = false;  // towards a prior; otherwise the baseline is the group's mean
  bool scales = false;   // by the group's standard deviation
  double half_range = 0.0;
  double eps = 0.0;
  double cost = 0.0;
  double below_most = 0.0;  // 1 if the groups have fewer than max_rollouts, else 0
};

// Functions on lanes are inlined into the function that is compiled for several instruction sets. They take lanes by
// reference, because how lanes are passed by value depends on the instruction set.
#define V05_LANES [[gnu::always_inline]] inline

template <class Value>
V05_LANES void load(const Value* from, Lanes& to) {
  LanesOf<Value> values;
  std::memcpy(&values, from, sizeof(values));
  to = __builtin_convertvector(values, Lanes);
}

template <class Value>
V05_LANES void store(const Lanes& from, Value* to) {
  const auto values = __builtin_convertvector(from, LanesOf<Value>);
  std::memcpy(to, &values, sizeof(values));
}

// The place in the table of the first of the lanes' groups. Null data if statistics are not wanted.
struct Place {
  double* data = nullptr;
  std::size_t groups = 0;

  V05_LANES void put(Statistic column, const Lanes& values) const {
    store(values, data + static_cast<std::size_t>(column) * groups);
  }
};

// The arithmetic of MomentsAccumulator in the same order of operations, with selections in place of branches.
template <std::size_t kSize>
struct LaneMoments {
  static constexpr auto kCount = static_cast<double>(kSize);
  Lanes mean;
  Lanes variance;
  Lanes differs{};  // sum of absolute deviations from the first; 0 if all are equal

  template <class Real>
  V05_LANES explicit LaneMoments(const Real* rewards) {
    Lanes first;
    load_each(rewards, first);
    Lanes sum{};
    Lanes squares{};
    for (std::size_t i = 1; i < kSize; ++i) {
      Lanes reward;
      load_each(rewards + i, reward);
      const Lanes deviation = reward - first;
      sum += deviation;
      squares += deviation * deviation;
      differs += deviation < 0.0 ? -deviation : deviation;
    }
    mean = differs == 0.0 ? first : (kCount * first + sum) / kCount;
    const Lanes m2 = squares - sum * (sum / kCount);
    const Lanes positive = m2 > 0.0 ? m2 : Lanes{};
    const Lanes known = m2 != m2 ? Lanes{} + std::numeric_limits<double>::infinity() : positive;  // squares overflowed
    variance = known / (kCount - 1.0);
  }

  // Adds one rollout of each group.
  template <class Real>
  V05_LANES static void load_each(const Real* r, Lanes& to) {
    const LanesOf<Real> values = {r[0], r[kSize], r[2 * kSize], r[3 * kSize]};
    to = __builtin_convertvector(values, Lanes);
  }
};

// The arithmetic of shrinkage and osla_gain. Replaces `baseline`, which holds the mean, by its fusion with the prior.
V05_LANES void shrink(const Task& task, double count, const Lanes& prior, Lanes& baseline, const Place& table) {
  const Lanes mean = baseline;
  const auto none = prior != prior;
  const Lanes difference = (mean - prior) / task.half_range;
  const Lanes squared = difference * difference;
  const Lanes statistic = count * squared;
  const Lanes weight = statistic > 1.0 ? 1.0 - 1.0 / statistic : Lanes{};
  baseline = none ? mean : prior + weight * (mean - prior);
  if (table.data == nullptr) {
    return;
  }
  const Lanes excess = squared - 1.0 / count;
  const Lanes bias = excess > 0.0 ? excess : Lanes{};
  const Lanes fall = bias / (count * bias + 1.0) - bias / ((count + 1.0) * bias + 1.0);
  const Lanes gain = none ? Lanes{} + 1.0 / (count * (count + 1.0)) : fall;
  const Lanes shown_weight = none ? Lanes{} + 1.0 : weight;
  table.put(Statistic::kMse, shown_weight / count * task.half_range * task.half_range);
  table.put(Statistic::kWeight, shown_weight);
  table.put(Statistic::kStatistic, none ? prior : statistic);
  table.put(Statistic::kTakeMore, gain > task.cost ? Lanes{} + task.below_most : Lanes{});
}

// The arithmetic of Judge, on rows in their order in memory.
template <std::size_t kSize, class Real, class Out>
V05_LANES void judge_rows(const Task& task, const Real* rewards, const Lanes& baseline, const Lanes& divisor,
                          Out* out) {
  for (std::size_t row = 0; row < kAbreast * kSize; row += kAbreast) {
    Lanes advantage;
    load(rewards + row, advantage);
    Lanes of_row;
    Lanes over;
    for (std::size_t l = 0; l < kAbreast; ++l) {
      of_row[l] = baseline[(row + l) / kSize];
      over[l] = divisor[(row + l) / kSize];
    }
    advantage -= of_row;
    if (task.scales) {
      advantage /= over;
    }
    store(advantage, out + row);
  }
}

template <std::size_t kSize, class Real, class Out>
V05_MULTIVERSION void judge_blocks(const Task& task, const Real* rewards, const double* prior, Out* out, Place table,
                                   std::size_t blocks) {
  for (std::size_t block = 0; block < blocks; ++block) {
    const LaneMoments<kSize> moments(rewards + block * kAbreast * kSize);
    Lanes baseline = moments.mean;
    if (task.shrinks) {
      Lanes given = Lanes{} + std::numeric_limits<double>::quiet_NaN();
      if (prior != nullptr) {
        load(prior + block * kAbreast, given);
      }
      shrink(task, moments.kCount, given, baseline, table);
    }
    if (table.data != nullptr) {
      table.put(Statistic::kCount, Lanes{} + moments.kCount);
      table.put(Statistic::kNonfinite, Lanes{});
      table.put(Statistic::kClipped, Lanes{});
      table.put(Statistic::kMean, moments.mean);
      table.put(Statistic::kVar, moments.variance);
      table.put(Statistic::kBaseline, baseline);
      table.data += kAbreast;
    }
    Lanes divisor{};
    if (task.scales) {
      for (std::size_t l = 0; l < kAbreast; ++l) {
        divisor[l] = std::sqrt(moments.variance[l]) + task.eps;
      }
      divisor = moments.differs == 0.0 ? Lanes{} + 1.0 : divisor;
    }
    judge_rows<kSize>(task, rewards + block * kAbreast * kSize, baseline, divisor, out + block * kAbreast * kSize);
  }
}

// The number of consecutive blocks of groups of `size` rows from `begin` on.
std::size_t blocks_of(std::span<const std::int64_t> offsets, std::int64_t size, std::size_t begin, std::size_t end) {
  std::size_t blocks = 0;
  for (std::size_t g = begin; g + kAbreast <= end; g += kAbreast) {
    std::uint64_t other = 0;
    for (std::size_t l = 0; l < kAbreast; ++l) {
      other |= static_cast<std::uint64_t>(offsets[g + l + 1] - offsets[g + l] - size);
    }
    if (other != 0) {
      break;
    }
    ++blocks;
  }
  return blocks;
}

}  // namespace

bool fits_lanes(const Options& options) {
  const bool plain = options.baseline == Baseline::kGroupMean || options.baseline == Baseline::kShrinkage;
  return plain && !options.leave_one_out && (options.scale == Scale::kNone || options.scale == Scale::kGroup);
}

template <class Real, class Out>
std::size_t judge_lanes(std::span<const Real> rewards, std::span<const std::int64_t> offsets,
                        std::span<const double> prior, const Options& options, std::span<Out> advantages,
                        const Table& table, std::size_t begin, std::size_t end) {
  const std::int64_t size = offsets[begin + 1] - offsets[begin];
  const std::size_t first = within(static_cast<std::uint64_t>(offsets[begin]), rewards.size());
  const Task task{
      .shrinks = options.baseline == Baseline::kShrinkage,
      .scales = options.scale == Scale::kGroup,
      .half_range = options.half_range(),
      .eps = options.eps,
      .cost = options.cost,
      .below_most = size < options.max_rollouts ? 1.0 : 0.0,
  };
  const auto judge = [&]<std::size_t kSize> {
    // Another thread may change the offsets, so they are not used as addresses below: blocks are contiguous, and
    // limited to the rows there are.
    const std::size_t room = (rewards.size() - first) / (kAbreast * kSize);
    const std::size_t blocks = std::min(blocks_of(offsets, size, begin, end), room);
    if (blocks > 0) {
      judge_blocks<kSize>(task, rewards.data() + first, prior.empty() ? nullptr : prior.data() + begin,
                          advantages.data() + first,
                          Place{.data = table ? table.data + begin : nullptr, .groups = table.groups}, blocks);
    }
    return blocks * kAbreast;
  };
  switch (size) {
    case 2:
      return judge.template operator()<2>();
    case 4:
      return judge.template operator()<4>();
    case 8:
      return judge.template operator()<8>();
    case 16:
      return judge.template operator()<16>();
    default:
      return 0;
  }
}

template std::size_t judge_lanes(std::span<const float>, std::span<const std::int64_t>, std::span<const double>,
                                 const Options&, std::span<float>, const Table&, std::size_t, std::size_t);
template std::size_t judge_lanes(std::span<const float>, std::span<const std::int64_t>, std::span<const double>,
                                 const Options&, std::span<double>, const Table&, std::size_t, std::size_t);
template std::size_t judge_lanes(std::span<const double>, std::span<const std::int64_t>, std::span<const double>,
                                 const Options&, std::span<float>, const Table&, std::size_t, std::size_t);
template std::size_t judge_lanes(std::span<const double>, std::span<const std::int64_t>, std::span<const double>,
                                 const Options&, std::span<double>, const Table&, std::size_t, std::size_t);

}  // namespace v05
