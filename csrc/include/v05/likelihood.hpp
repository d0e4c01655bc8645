// The likelihood ratio of a group's rewards under a Beta distribution of their success rate and under the vague one.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <numbers>

namespace v05 {

struct Beta {
  double a = 0.5;
  double b = 0.5;

  [[nodiscard]] double mean() const { return a / (a + b); }
  [[nodiscard]] double complement() const { return b / (a + b); }  // 1 - mean, computed without cancellation
  [[nodiscard]] double variance() const { return mean() * complement() / (a + b + 1.0); }
  [[nodiscard]] Beta after(double successes, double failures) const { return {.a = a + successes, .b = b + failures}; }
};

inline constexpr Beta kVague{.a = 0.5, .b = 0.5};

// Gamma(z + x) / Gamma(z) as a function of x >= 0, for z > 0. z is raised until Stirling's series is exact up to
// rounding. Differences of lgamma would lose digits for large z; here the leading terms of the series are subtracted
// analytically.
class Rising {
 public:
  struct Value {  // the value is above / below * exp(log)
    double above = 1.0;
    double below = 1.0;
    double log = 0.0;
  };

  explicit Rising(double z) : z_(z), product_(product(z)), log_(std::log(z + kRaise)), series_(series(z + kRaise)) {}

  Value operator()(double x) const {
    constexpr double kLarge = 32.0;
    const double raised = z_ + kRaise;
    const double end = raised + x;
    const double grown = raised < kLarge ? std::log(end) - log_ : std::log1p(x / raised);
    return {
        .above = product_,
        .below = product(z_ + x),
        .log = (raised - 0.5) * grown + x * (log_ + grown - 1.0) + (series(end) - series_),
    };
  }

 private:
  static constexpr double kRaise = 10.0;

  // z (z + 1) .. (z + 9), multiplied in pairs from both ends.
  static double product(double z) {
    const double w = z * (z + 9.0);
    return w * (w + 8.0) * ((w + 14.0) * (w + 18.0)) * (w + 20.0);
  }

  static double series(double y) {
    const double r = 1.0 / y;
    const double r2 = r * r;
    constexpr auto kTerms =
        std::to_array<double>({-691.0 / 360360.0, 1.0 / 1188.0, -1.0 / 1680.0, 1.0 / 1260.0, -1.0 / 360.0, 1.0 / 12.0});
    double sum = 0.0;
    for (const double term : kTerms) {
      sum = sum * r2 + term;
    }
    return sum * r;
  }

  double z_;
  double product_;
  double log_;
  double series_;
};

// Gamma(1/2 + x) Gamma(1/2 + n - x) / pi for a whole n >= 1 and x in [0, n]. The whole parts are multiplied out. The
// rest is Gamma(1 - d) Gamma(1 + d) = pi d / sin(pi d) with |d| <= 1/2, so no logarithm is needed.
inline Rising::Value reflected(double x, int n) {
  constexpr auto kSinc = [] {  // Taylor series of sin(pi d) / d in d^2, exact up to rounding, last term first
    std::array<double, 11> terms{};
    double term = std::numbers::pi;
    for (std::size_t i = 0; i < terms.size(); ++i) {
      terms[terms.size() - 1 - i] = term;
      const auto order = 2.0 * static_cast<double>(i);
      term *= -std::numbers::pi * std::numbers::pi / ((order + 2.0) * (order + 3.0));
    }
    return terms;
  }();
  const int whole = std::min(static_cast<int>(x), n - 1);
  const double d = 0.5 - (x - whole);
  double sinc = 0.0;
  for (const double term : kSinc) {
    sinc = sinc * (d * d) + term;
  }
  double product = 1.0;
  for (int i = 1; i < n; ++i) {
    product *= i <= whole ? i - d : i - whole + d;
  }
  return {.above = product, .below = sinc};
}

// Up to this size of a group, products of whole numbers are used. Within the bounds of a Calibration they neither
// overflow nor underflow.
inline constexpr double kFew = 16.0;

// The likelihood of a group of `count` rollouts under `rate` over that under the vague distribution, as a function of
// its successes, which need not be a whole number.
class LikelihoodRatio {
 public:
  LikelihoodRatio(const Beta& rate, double count)
      : count_(count), is_few_(count >= 1.0 && count <= kFew), a_(rate.a), b_(rate.b) {
    const double total = rate.a + rate.b;
    if (is_few_) {
      double above = 1.0;
      double below = 1.0;
      for (int n = 0; n < static_cast<int>(count); ++n) {
        above *= 1.0 + n;
        below *= total + n;
      }
      of_count_ = above / below;
    } else {
      const Rising::Value both = Rising(total)(count);
      const Rising::Value vague_both = Rising(kVague.a + kVague.b)(count);
      of_count_ = (both.below * vague_both.above) / (both.above * vague_both.below);
      log_of_count_ = vague_both.log - both.log;
    }
  }

  double operator()(double successes) const {
    const double failures = count_ - successes;
    const Rising::Value a = a_(successes);
    const Rising::Value b = b_(failures);
    if (is_few_) {
      const Rising::Value vague = reflected(successes, static_cast<int>(count_));
      return (a.above * b.above * vague.below * of_count_) / (a.below * b.below * vague.above) *
             std::exp(a.log + b.log);
    }
    const Rising half(kVague.a);
    const Rising::Value vague_a = half(successes);
    const Rising::Value vague_b = half(failures);
    return (a.above * vague_a.below) / (a.below * vague_a.above) *
           ((b.above * vague_b.below) / (b.below * vague_b.above)) * of_count_ *
           std::exp(a.log - vague_a.log + (b.log - vague_b.log) + log_of_count_);
  }

 private:
  double count_;
  bool is_few_;
  Rising a_;
  Rising b_;
  double of_count_;  // of_count_ * exp(log_of_count_) is the factor without successes
  double log_of_count_ = 0.0;
};

// The likelihood ratio for one number of successes. For a small group with whole successes it is a few products.
inline double likelihood_ratio(const Beta& rate, double successes, double failures) {
  const double count = successes + failures;
  if (count > kFew || static_cast<double>(static_cast<int>(successes)) != successes) {
    return LikelihoodRatio(rate, count)(successes);
  }
  double above = 1.0;
  double below = 1.0;
  for (int rollout = 0; rollout < static_cast<int>(count); ++rollout) {  // successes first; the order does not matter
    const auto n = static_cast<double>(rollout);
    const bool success = n < successes;
    const double before = success ? n : n - successes;  // earlier rollouts with the same outcome
    above *= ((success ? rate.a : rate.b) + before) * (1.0 + n);
    below *= (kVague.a + before) * (rate.a + rate.b + n);
  }
  return above / below;
}

}  // namespace v05
