// The C++ part of v05.ops.token_statistics: sums over the vocabulary, and the gradient of the logits. No Python.
#pragma once

#include <cstddef>
#include <cstdint>

namespace v05 {

inline constexpr std::int64_t kIgnored = -100;  // the id of an ignored token

// Rows of contiguous logits, for sequences of `length` tokens. Strides are in elements.
template <class Value>
struct LogitRows {
  Value* data = nullptr;
  std::int64_t length = 1;
  std::int64_t stride_sequence = 0;
  std::int64_t stride_token = 0;

  [[nodiscard]] Value* row(std::int64_t token) const {
    return data + token / length * stride_sequence + token % length * stride_token;
  }
};

// The targets of tokens, whose rows are the columns `first` .. first + columns - 1 of the vocabulary.
struct TokenTargets {
  const std::int64_t* ids = nullptr;  // (tokens,)
  std::int64_t tokens = 0;
  std::int64_t columns = 0;
  std::int64_t first = 0;
  double temperature = 1.0;
};

// Writes the sums of each token that is not ignored into the rows of `out`, which are `stride` apart: m, s, a, q and
// x_y as v05/ops/token_statistics/sums.py defines them.
void add_up_logits(const LogitRows<const float>& logits, const TokenTargets& targets, float* out, std::int64_t stride,
                   int threads);

// The inputs of the backward pass: the state of tokens, and the gradients of their statistics.
struct TokenUpstream {
  const float* state = nullptr;  // the rows m, 1 / Z, mean of d and 1 - pi(y), `stride` apart
  std::int64_t stride = 0;
  const float* of_logprob = nullptr;
  const float* of_entropy = nullptr;  // null if there is no gradient of the entropy
};

// Writes the gradient of every row into `out`, which may be the logits.
void write_logit_gradient(const LogitRows<const float>& logits, const TokenTargets& targets,
                          const TokenUpstream& upstream, const LogitRows<float>& out, int threads);

}  // namespace v05
