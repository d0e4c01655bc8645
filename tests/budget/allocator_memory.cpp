// Makes the first allocation of a call fail, then the second, and so on until the call succeeds. After each failure the
// allocator must be as it was before the call, and in the end it must be as if memory had never run out. Built by
// tests/budget/test_memory.py; prints "ok".
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

#include "v05/allocator.hpp"

namespace {

std::int64_t left = -1;  // allocations until memory runs out; never if negative

void* allocate(std::size_t size) {
  if (left >= 0 && left-- == 0) {
    throw std::bad_alloc();
  }
  void* memory = std::malloc(size == 0 ? 1 : size);
  if (memory == nullptr) {
    throw std::bad_alloc();
  }
  return memory;
}

}  // namespace

void* operator new(std::size_t size) { return allocate(size); }
void* operator new[](std::size_t size) { return allocate(size); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t /*size*/) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t /*size*/) noexcept { std::free(memory); }

namespace {

using v05::RolloutAllocator;

std::int64_t failed_calls = 0;

void fail_run(const char* what) {
  std::printf("%s\n", what);
  std::exit(1);
}

// The snapshot and the counts of an allocator: everything that its callers can see.
std::string state_of(const RolloutAllocator& allocator) {
  const v05::AllocatorCounts counts = allocator.counts();
  std::string state = allocator.snapshot();
  for (const std::int64_t count :
       {counts.open_groups, counts.closed_groups, counts.queued, counts.leased, counts.reported, counts.failed,
        counts.expired, counts.invalid, counts.duplicate, counts.late, counts.unknown}) {
    state += " " + std::to_string(count);
  }
  return state;
}

// Repeats a call until memory suffices. Returns false if the allocator refused the call's arguments.
template <class Call>
bool persist(const RolloutAllocator& allocator, bool runs_out, const Call& call) {
  const std::string before = state_of(allocator);
  for (std::int64_t n = 0;; ++n) {
    left = runs_out ? n : -1;
    try {
      call();
      left = -1;
      return true;
    } catch (const std::bad_alloc&) {
      left = -1;
      ++failed_calls;
    } catch (const std::invalid_argument&) {
      left = -1;
      if (state_of(allocator) != before) {
        fail_run("a refused call changed something");
      }
      return false;
    }
    if (state_of(allocator) != before) {
      fail_run("a call without memory changed something");
    }
    RolloutAllocator::restore(allocator.snapshot());
  }
}

template <class Id>
Id id_of(std::int64_t group) {
  if constexpr (std::is_same_v<Id, std::string>) {
    return "a group's name is longer than a short string " + std::to_string(group);
  } else {
    return group * 1'000'003;
  }
}

// Runs an allocator to its end. Returns its leases, its drained rewards and its last state as text.
template <class Id>
std::string run(const v05::AllocatorOptions& options, bool runs_out) {
  RolloutAllocator allocator(options);
  std::mt19937 random(7);
  std::string seen;
  std::int64_t next_group = 0;
  std::vector<std::int64_t> out;
  const auto open = [&](std::int64_t count, bool repeats, bool with_counts) {
    std::vector<Id> ids;
    std::vector<double> priors;
    std::vector<std::int64_t> counts;
    for (std::int64_t i = 0; i < count; ++i) {
      ids.push_back(id_of<Id>(repeats && i + 1 == count ? next_group : next_group + i));
      priors.push_back(i % 3 == 0 ? std::numeric_limits<double>::quiet_NaN() : 0.25);
      counts.push_back(options.initial + i % (options.maximum - options.initial + 1));
    }
    const v05::GroupIdList list = ids;
    const bool opened = persist(
        allocator, runs_out, [&] { allocator.open(list, priors, with_counts ? counts : std::vector<std::int64_t>()); });
    next_group += opened ? count : 0;
    seen += opened ? "o" : "r";
  };
  for (int step = 0; step < 120 || !allocator.done(); ++step) {
    if (step < 120 && step % 4 == 0) {
      open(1 + random() % 5, false, random() % 2 == 0);
      open(3, true, false);
    }
    v05::Leases leases;
    const auto limit = static_cast<std::int64_t>(random() % 12);
    persist(allocator, runs_out, [&] { leases = allocator.lease(limit, step); });
    for (std::size_t i = 0; i < leases.lease_ids.size(); ++i) {
      out.push_back(leases.lease_ids[i]);
      seen += " " + std::to_string(leases.lease_ids[i]) + ":" + std::to_string(leases.seeds[i]);
    }
    std::vector<std::int64_t> reported;
    std::vector<std::int64_t> broken;
    std::vector<double> rewards;
    for (std::size_t i = 0; i < out.size();) {
      const auto luck = random() % 8;
      if (luck < 4) {
        reported.push_back(out[i]);
        rewards.push_back(luck == 0 ? std::numeric_limits<double>::quiet_NaN() : static_cast<double>(luck % 2));
      } else if (luck == 4) {
        broken.insert(broken.end(), {out[i], out[i]});  // the second of each pair is late
      }
      luck < 6 ? void(out.erase(out.begin() + static_cast<std::ptrdiff_t>(i))) : void(++i);  // some are forgotten
    }
    persist(allocator, runs_out, [&] { allocator.report(reported, rewards); });
    persist(allocator, runs_out, [&] { allocator.fail(broken); });
    persist(allocator, runs_out, [&] { allocator.report(reported, rewards); });  // duplicates
    if (random() % 3 == 0) {
      persist(allocator, runs_out, [&] { allocator.expire(2e-6, step); });
    }
    if (random() % 4 == 0) {
      v05::ClosedGroups closed;
      persist(allocator, runs_out, [&] { closed = allocator.drain(); });
      for (const double reward : closed.rewards) {
        seen += " " + std::to_string(reward);
      }
    }
  }
  return seen + state_of(allocator);
}

template <class Id>
void compare(const v05::AllocatorOptions& options) {
  if (run<Id>(options, true) != run<Id>(options, false)) {
    fail_run("a call that failed before has another result");
  }
}

}  // namespace

int main() {
  const v05::Calibration calibration{.alpha = 0.1, .beta = 0.9, .kappa = 4.0, .eps = 0.1};
  const std::vector<v05::AllocatorOptions> all = {
      {.rule = v05::BudgetRule::kOsla, .initial = 2, .maximum = 9, .cost = 1e-4, .chunk = 3},
      {.rule = v05::BudgetRule::kOsla, .initial = 2, .maximum = 12, .cost = 1e-3, .chunk = std::nullopt},
      {.rule = v05::BudgetRule::kUniform, .initial = 3, .maximum = 5, .max_attempts = 2},
      {.rule = v05::BudgetRule::kCalibrated, .initial = 1, .maximum = 12, .calibration = calibration},
      {.rule = v05::BudgetRule::kTotal, .initial = 2, .maximum = 8, .total = 60, .chunk = 2, .max_attempts = 1},
  };
  for (const v05::AllocatorOptions& options : all) {
    compare<std::int64_t>(options);
    compare<std::string>(options);
  }
  if (failed_calls < 1000) {
    fail_run("memory did not run out");
  }
  std::printf("ok\n");
}
