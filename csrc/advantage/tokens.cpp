#include "tokens.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstdint>
#include <type_traits>

#include "buffers.hpp"
#include "checks.hpp"
#include "v05/multiversion.hpp"
#include "v05/parallel.hpp"

namespace v05 {
namespace {

constexpr std::int64_t kTokenRowBlock = 16;  // rows that a thread takes at a time

// Two 512-bit registers of partial sums. The lanes are added in a fixed order for every instruction set. Blocks of only
// zeros, which most token rewards are, change no lane and are skipped without reading their mask.
constexpr std::size_t kLanes = 16;
constexpr std::size_t kZeroBlock = 64;

template <class Reward, class Mask>
V05_MULTIVERSION double sum_row(const Reward* rewards, const Mask* mask, std::size_t tokens) {
  // Rewards are kept or cleared by their bits, because g++ 12 compiles `mask ? reward : 0` to a wrong masked load here.
  using Bits = std::conditional_t<sizeof(Reward) == sizeof(std::uint32_t), std::uint32_t, std::uint64_t>;
  const auto kept = [&](std::size_t t) {
    return std::bit_cast<Reward>(std::bit_cast<Bits>(rewards[t]) & (mask[t] != Mask{0} ? ~Bits{0} : Bits{0}));
  };
  std::array<double, kLanes> lanes{};
  std::size_t t = 0;
  for (; t + kZeroBlock <= tokens; t += kZeroBlock) {
    Bits any = 0;
    for (std::size_t i = 0; i < kZeroBlock; ++i) {
      any |= std::bit_cast<Bits>(rewards[t + i]);
    }
    for (std::size_t part = 0; any != 0 && part < kZeroBlock; part += kLanes) {
      std::array<Reward, kLanes> values{};
      for (std::size_t lane = 0; lane < kLanes; ++lane) {
        values[lane] = kept(t + part + lane);
      }
      for (std::size_t lane = 0; lane < kLanes; ++lane) {
        lanes[lane] += static_cast<double>(values[lane]);
      }
    }
  }
  for (; t < tokens; ++t) {
    lanes[t % kLanes] += static_cast<double>(kept(t));
  }
  double sum = 0.0;
  for (const double lane : lanes) {
    sum += lane;
  }
  return sum;
}

template <class Out, class Mask>
V05_MULTIVERSION void spread_row(Out advantage, const Mask* mask, std::size_t tokens, Out* out) {
  for (std::size_t t = 0; t < tokens; ++t) {
    out[t] = mask[t] != Mask{0} ? advantage : Out{0};
  }
}

// Whether a row of a mask has only values 0 and 1. This is a loop of its own after the one that spreads the row, when
// the row is in the cache. In the same loop it would make that loop wait longer for memory.
template <class Mask>
V05_MULTIVERSION bool are_flags(const Mask* mask, std::size_t tokens) {
  if constexpr (std::is_integral_v<Mask>) {
    using Bits = std::make_unsigned_t<Mask>;
    Bits bits = 0;  // the bits of all values
    for (std::size_t t = 0; t < tokens; ++t) {
      bits |= static_cast<Bits>(mask[t]);
    }
    return is_flag(bits);
  } else {
    unsigned odd = 0;
    for (std::size_t t = 0; t < tokens; ++t) {
      odd |= static_cast<unsigned>(mask[t] != Mask{0}) & static_cast<unsigned>(mask[t] != Mask{1});
    }
    return odd == 0;
  }
}

// Packed rows start anywhere. The second loop starts at a cache line, so that no vector store spans two lines.
template <class Out>
V05_MULTIVERSION void fill_row(Out advantage, std::size_t tokens, Out* out) {
  constexpr std::size_t kLine = 64 / sizeof(Out);
  const std::size_t past_line = reinterpret_cast<std::uintptr_t>(out) / sizeof(Out) % kLine;
  const std::size_t head = std::min(tokens, (kLine - past_line) % kLine);
  std::size_t t = 0;
  for (; t < head; ++t) {
    out[t] = advantage;
  }
  for (; t < tokens; ++t) {
    out[t] = advantage;
  }
}

template <class Body>
void for_token_rows(std::size_t rows, std::size_t tokens, int threads, const Body& body) {
  for_blocks(static_cast<std::int64_t>(rows), kTokenRowBlock, static_cast<std::int64_t>(tokens), threads,
             [&](std::int64_t /*block*/, std::int64_t begin, std::int64_t end) {
               for (std::int64_t row = begin; row < end; ++row) {
                 body(static_cast<std::size_t>(row));
               }
             });
}

template <class Reward, class Mask>
void sum_rows(std::span<const Reward> rewards, std::span<const Mask> mask, std::span<double> sums, int threads) {
  const std::size_t tokens = sums.empty() ? 0 : rewards.size() / sums.size();
  for_token_rows(sums.size(), rewards.size(), threads, [&](std::size_t row) {
    sums[row] = sum_row(rewards.data() + row * tokens, mask.data() + row * tokens, tokens);
  });
}

// Returns whether the mask has only values 0 and 1.
template <class Out, class Mask>
bool spread_padded(std::span<const Out> advantages, std::span<const Mask> mask, std::span<Out> out, int threads) {
  const std::size_t tokens = advantages.empty() ? 0 : out.size() / advantages.size();
  std::atomic<bool> all_flags = true;
  for_token_rows(advantages.size(), out.size(), threads, [&](std::size_t row) {
    const Mask* of_row = mask.data() + row * tokens;
    spread_row(advantages[row], of_row, tokens, out.data() + row * tokens);
    if (!are_flags(of_row, tokens)) {
      all_flags.store(false, std::memory_order_relaxed);
    }
  });
  return all_flags;
}

template <class Out>
void spread_packed(std::span<const Out> advantages, std::span<const std::int64_t> starts, std::span<Out> out,
                   int threads) {
  for_token_rows(advantages.size(), out.size(), threads, [&](std::size_t row) {
    const Part own = part_of(starts, row, out.size());
    fill_row(advantages[row], std::max(own.begin, own.end) - own.begin, out.data() + own.begin);
  });
}

}  // namespace

std::vector<double> sum_tokens(const Buffer& rewards, const Buffer& mask, std::size_t rows, int threads) {
  std::vector<double> sums(rows);
  with_real(rewards, [&](auto tokens) {
    with_mask(mask, [&](auto flags) {
      using Reward = decltype(tokens)::value_type;
      sum_rows(std::span<const Reward>(tokens), flags, std::span(sums), threads);
    });
  });
  return sums;
}

template <class Out>
void spread_tokens(std::span<const Out> advantages, const Rollouts& rollouts, std::span<Out> out, int threads) {
  if (!rollouts.mask) {
    spread_packed(advantages, rollouts.cu_seqlens, out, threads);
    return;
  }
  bool all_flags = true;
  with_mask(rollouts.mask, [&](auto flags) { all_flags = spread_padded(advantages, flags, out, threads); });
  if (!all_flags) {
    check_mask(rollouts.mask, advantages.size());
  }
}

template void spread_tokens<float>(std::span<const float>, const Rollouts&, std::span<float>, int);
template void spread_tokens<double>(std::span<const double>, const Rollouts&, std::span<double>, int);

}  // namespace v05
