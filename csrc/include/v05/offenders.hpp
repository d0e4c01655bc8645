// Error messages that list the offending values.
#pragma once

#include <cstddef>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace v05 {

// Collects offending positions and values, and throws one readable error for them.
class Offenders {
 public:
  void add(std::size_t position, double value) {
    if (positions_.size() < kShown) {
      positions_.push_back(position);
      values_.push_back(value);
    }
    ++count_;
  }

  [[nodiscard]] bool any() const { return count_ > 0; }

  [[noreturn]] void raise(const std::string& what, const std::string& remedy) const {
    std::ostringstream message;
    message.precision(std::numeric_limits<double>::digits10);  // with fewer digits a value could look legal
    message << what << ' ';
    for (std::size_t i = 0; i < positions_.size(); ++i) {
      message << (i > 0 ? ", " : "") << positions_[i] << " (" << values_[i] << ')';
    }
    if (count_ > positions_.size()) {
      message << " and " << count_ - positions_.size() << " more";
    }
    message << ". " << remedy;
    throw std::invalid_argument(message.str());
  }

 private:
  static constexpr std::size_t kShown = 8;
  std::vector<std::size_t> positions_;
  std::vector<double> values_;
  std::size_t count_ = 0;
};

}  // namespace v05
