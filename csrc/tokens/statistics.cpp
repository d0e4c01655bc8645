#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numbers>

#include "v05/multiversion.hpp"
#include "v05/parallel.hpp"
#include "v05/tokens.hpp"

namespace v05 {
namespace tokens {
namespace {

// A 256-bit register, or two smaller registers.
constexpr std::int64_t kAbreast = 8;
using Floats [[gnu::vector_size(kAbreast * sizeof(float))]] = float;
using FloatsAnywhere [[gnu::vector_size(kAbreast * sizeof(float)), gnu::aligned(sizeof(float)), gnu::may_alias]] =
    float;
using Integers [[gnu::vector_size(kAbreast * sizeof(float))]] = std::int32_t;

constexpr std::int64_t kBlock = 64 * kAbreast;  // columns that are summed in float before they are added in double
constexpr std::int64_t kBlockWork = 16384;      // logits that a thread takes at a time
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Functions on lanes are inlined into the function that is compiled for several instruction sets.
#define V05_LANES [[gnu::always_inline]] inline

// Not with memcpy, which GCC 12 compiles to four moves through general registers in functions with several instruction
// sets.
V05_LANES void load(const float* from, Floats& to) { to = *reinterpret_cast<const FloatsAnywhere*>(from); }

V05_LANES void store(const Floats& from, float* to) { *reinterpret_cast<FloatsAnywhere*>(to) = from; }

V05_LANES double sum(const Floats& lanes) {
  double total = 0.0;
  for (std::int64_t i = 0; i < kAbreast; ++i) {
    total += static_cast<double>(lanes[i]);
  }
  return total;
}

// The exponential of a difference of logits divided by the temperature.
struct Exponential {
  float inverse = 1.0F;    // 1 / temperature
  float bits = 0.0F;       // log2(e) / temperature
  float step_high = 0.0F;  // temperature ln 2 with so few digits that whole multiples up to 150 are exact
  float step_low = 0.0F;   // the rest of temperature ln 2

  explicit Exponential(double temperature)
      : inverse(static_cast<float>(1.0 / temperature)), bits(static_cast<float>(std::numbers::log2e / temperature)) {
    const double step = temperature * std::numbers::ln2;
    int exponent = 0;
    const double digits = std::frexp(step, &exponent);
    step_high = static_cast<float>(std::ldexp(std::floor(std::ldexp(digits, 16)), exponent - 16));
    step_low = static_cast<float>(step - static_cast<double>(step_high));
  }

  // Computes the exponential of d + lost, where `lost` is far smaller than d. The polynomial is from Cephes' expf, with
  // an error of 2e-9.
  V05_LANES void operator()(const Floats& d, const Floats& lost, Floats& e) const {
    constexpr float kRounds = 12582912.0F;  // 1.5 * 2^23: adding it rounds to a whole number
    const Floats in_bits = d * bits;
    const Floats shifted = in_bits + kRounds;
    const Floats whole = shifted - kRounds;
    const Floats r = ((d - whole * step_high) - whole * step_low + lost) * inverse;
    Floats p = r * 1.9875691500e-4F + 1.3981999507e-3F;
    p = p * r + 8.3334519073e-3F;
    p = p * r + 4.1665795894e-2F;
    p = p * r + 1.6666665459e-1F;
    p = p * r + 5.0000001201e-1F;
    p = p * r * r + r + 1.0F;
    const Integers power = (reinterpret_cast<Integers>(shifted) - std::bit_cast<std::int32_t>(kRounds) + 127) << 23;
    const Floats scaled = p * reinterpret_cast<Floats>(power);
    e = in_bits < -125.0F ? Floats{} : scaled;  // also for masked logits, for which r is NaN
  }
};

// Loads at most one register of logits, and fills the rest of it with -inf.
V05_LANES void load_some(const float* from, std::int64_t count, Floats& to) {
  if (count >= kAbreast) {
    load(from, to);
    return;
  }
  to = Floats{} - kInfinity;
  for (std::int64_t i = 0; i < count; ++i) {
    to[i] = from[i];
  }
}

V05_LANES float largest_of(const float* logits, std::int64_t columns) {
  Floats lanes = Floats{} - kInfinity;
  Floats others = lanes;
  Floats x;
  std::int64_t column = 0;
  for (; column + 2 * kAbreast <= columns; column += 2 * kAbreast) {
    load(logits + column, x);
    lanes = x > lanes ? x : lanes;
    load(logits + column + kAbreast, x);
    others = x > others ? x : others;
  }
  lanes = others > lanes ? others : lanes;
  float most = lanes[0];
  for (std::int64_t i = 1; i < kAbreast; ++i) {
    most = std::max(most, lanes[i]);
  }
  for (; column < columns; ++column) {
    most = std::max(most, logits[column]);
  }
  return most;
}

// Sums of a row relative to its largest logit: those of the lanes, and in double those of all earlier blocks.
struct RowSums {
  float base = 0.0F;
  Floats of_lanes{};
  Floats slopes_of_lanes{};
  Floats squares_of_lanes{};
  double others = 0.0;
  double slopes = 0.0;
  double squares = 0.0;

  // Adds a register of logits except the target, if that is one of the lanes.
  V05_LANES void add(const Floats& x, const Exponential& exponential, std::int64_t target) {
    const Floats d = x - base;
    const Floats back = d - x;  // -base, rounded; `lost` is the rounding error of d
    const Floats lost = (x - (d - back)) - (base + back);
    Floats e;
    exponential(d, lost, e);
    if (target >= 0 && target < kAbreast) {
      e[target] = 0.0F;
    }
    of_lanes += e;
    slopes_of_lanes += e == 0.0F ? Floats{} : e * d;  // d may be -inf
    squares_of_lanes += e * e;
  }

  V05_LANES void end_block() {
    others += sum(of_lanes);
    slopes += sum(slopes_of_lanes);
    squares += sum(squares_of_lanes);
    of_lanes = slopes_of_lanes = squares_of_lanes = Floats{};
  }
};

std::int64_t column_of(const TokenTargets& targets, std::int64_t token) {
  const std::int64_t column = targets.ids[token] - targets.first;
  return column >= 0 && column < targets.columns ? column : -1;
}

V05_MULTIVERSION void add_up_rows(const LogitRows<const float>& logits, const TokenTargets& targets,
                                  const Exponential& exponential, float* out, std::int64_t stride, std::int64_t begin,
                                  std::int64_t end) {
  for (std::int64_t token = begin; token < end; ++token) {
    if (targets.ids[token] == kIgnored) {
      continue;
    }
    const float* row = logits.row(token);
    const std::int64_t columns = targets.columns;
    const std::int64_t target = column_of(targets, token);
    const float largest = largest_of(row, columns);
    RowSums sums = {.base = largest == -kInfinity ? 0.0F : largest};
    Floats x;
    std::int64_t column = 0;
    for (; column + kBlock <= columns; sums.end_block()) {
      for (const std::int64_t end = column + kBlock; column < end; column += kAbreast) {
        load(row + column, x);
        sums.add(x, exponential, target - column);
      }
    }
    for (; column < columns; column += kAbreast) {
      load_some(row + column, columns - column, x);
      sums.add(x, exponential, target - column);
    }
    sums.end_block();
    out[token] = largest;
    out[stride + token] = static_cast<float>(sums.others);
    out[2 * stride + token] = static_cast<float>(sums.slopes * static_cast<double>(exponential.inverse));
    out[3 * stride + token] = static_cast<float>(sums.squares);
    out[4 * stride + token] = target < 0 ? -kInfinity : row[target];
  }
}

// The gradient of a row is e^d (weight + slope max(d, least)), except at its target.
struct RowGradient {
  float largest = 0.0F;
  float weight = 0.0F;
  float slope = 0.0F;

  V05_LANES void operator()(const Floats& x, const Exponential& exponential, Floats& to) const {
    constexpr float kLeast = -200.0F;
    const Floats d = x - largest;
    exponential(d, Floats{}, to);
    const Floats scaled = d * exponential.inverse;
    to *= weight + slope * (scaled < kLeast ? Floats{} + kLeast : scaled);
  }
};

V05_MULTIVERSION void write_gradient_rows(const LogitRows<const float>& logits, const TokenTargets& targets,
                                          const TokenUpstream& upstream, const Exponential& exponential,
                                          const LogitRows<float>& out, std::int64_t begin, std::int64_t end) {
  for (std::int64_t token = begin; token < end; ++token) {
    float* to = out.row(token);
    const float g = upstream.of_logprob[token];
    const float h = upstream.of_entropy == nullptr ? 0.0F : upstream.of_entropy[token];
    if (targets.ids[token] == kIgnored || (g == 0.0F && h == 0.0F)) {
      std::fill(to, to + targets.columns, 0.0F);
      continue;
    }
    const float* row = logits.row(token);
    const std::int64_t columns = targets.columns;
    const float* state = upstream.state + token;
    const float scale = state[upstream.stride] * exponential.inverse;  // 1 / (Z temperature)
    const float mean = state[2 * upstream.stride];
    const RowGradient gradient = {.largest = state[0], .weight = scale * (h * mean - g), .slope = -scale * h};
    const std::int64_t target = column_of(targets, token);
    float at_target = 0.0F;
    if (target >= 0) {
      const RowGradient of_entropy = {.largest = state[0], .weight = scale * h * mean, .slope = -scale * h};
      Floats lanes;
      of_entropy(Floats{} + row[target], exponential, lanes);
      at_target = lanes[0] + g * exponential.inverse * state[3 * upstream.stride];
    }
    std::int64_t column = 0;
    Floats x;
    Floats made;
    for (; column + kAbreast <= columns; column += kAbreast) {
      load(row + column, x);
      gradient(x, exponential, made);
      store(made, to + column);
    }
    if (column < columns) {
      load_some(row + column, columns - column, x);
      gradient(x, exponential, made);
      std::memcpy(to + column, &made, static_cast<std::size_t>(columns - column) * sizeof(float));
    }
    if (target >= 0) {
      to[target] = at_target;
    }
  }
}

std::int64_t rows_at_a_time(std::int64_t columns) { return std::max<std::int64_t>(kBlockWork / columns, 1); }

}  // namespace
}  // namespace tokens

void add_up_logits(const LogitRows<const float>& logits, const TokenTargets& targets, float* out, std::int64_t stride,
                   int threads) {
  const tokens::Exponential exponential(targets.temperature);
  for_blocks(targets.tokens, tokens::rows_at_a_time(targets.columns), targets.tokens * targets.columns, threads,
             [&](std::int64_t, std::int64_t begin, std::int64_t end) {
               tokens::add_up_rows(logits, targets, exponential, out, stride, begin, end);
             });
}

void write_logit_gradient(const LogitRows<const float>& logits, const TokenTargets& targets,
                          const TokenUpstream& upstream, const LogitRows<float>& out, int threads) {
  const tokens::Exponential exponential(targets.temperature);
  for_blocks(targets.tokens, tokens::rows_at_a_time(targets.columns), targets.tokens * targets.columns, threads,
             [&](std::int64_t, std::int64_t begin, std::int64_t end) {
               tokens::write_gradient_rows(logits, targets, upstream, exponential, out, begin, end);
             });
}

}  // namespace v05
