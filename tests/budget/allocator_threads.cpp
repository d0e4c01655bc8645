// Several threads lease, report, fail, expire, count, snapshot and drain one allocator at once. In the end every
// rollout must have been counted exactly once. Built with a sanitizer by tests/budget/test_threads.py; prints "ok".
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <latch>
#include <mutex>
#include <numeric>
#include <random>
#include <thread>
#include <unordered_map>
#include <variant>
#include <vector>

#include "v05/allocator.hpp"

namespace {

constexpr std::int64_t kGroups = 2000;
constexpr int kThreads = 4;

double reward_of(std::int64_t group, std::int64_t index) {
  return static_cast<double>((static_cast<std::uint64_t>(group * 16 + index) * 0x9e3779b97f4a7c15U) >> 63U);
}

void fail_run(const char* what) {
  std::printf("%s\n", what);
  std::exit(1);
}

std::size_t run(const v05::AllocatorOptions& options) {
  v05::RolloutAllocator allocator(options);
  std::vector<std::int64_t> ids(kGroups);
  std::iota(ids.begin(), ids.end(), 0);
  allocator.open(ids, std::vector<double>(kGroups, 0.6), {});

  std::atomic<std::int64_t> clock = 0;
  std::mutex collecting;
  std::unordered_map<std::int64_t, std::vector<double>> collected;
  const auto drain = [&] {
    const v05::ClosedGroups closed = allocator.drain();
    const std::scoped_lock lock(collecting);
    const auto& names = std::get<std::vector<std::int64_t>>(closed.group_ids);
    for (std::size_t g = 0; g < names.size(); ++g) {
      const auto begin = closed.rewards.begin();
      if (!collected.emplace(names[g], std::vector(begin + closed.offsets[g], begin + closed.offsets[g + 1])).second) {
        fail_run("a group was drained twice");
      }
    }
  };
  std::latch start(kThreads);
  const auto work = [&](unsigned seed) {
    start.arrive_and_wait();
    std::mt19937 random(seed);
    while (!allocator.done()) {
      const v05::Leases leases = allocator.lease(1 + random() % 50, ++clock);
      std::vector<std::int64_t> reported;
      std::vector<double> rewards;
      std::vector<std::int64_t> broken;
      for (std::size_t i = 0; i < leases.lease_ids.size(); ++i) {
        if (const auto luck = random() % 100; luck < 3) {
          broken.push_back(leases.lease_ids[i]);
        } else if (luck > 3) {  // a forgotten lease must expire
          reported.push_back(leases.lease_ids[i]);
          rewards.push_back(reward_of(std::get<std::vector<std::int64_t>>(leases.groups)[i], leases.indices[i]));
        }
      }
      allocator.report(reported, rewards);
      allocator.fail(broken);
      allocator.report(reported, rewards);  // each is a duplicate or late
      switch (random() % 16) {
        case 0:
          drain();
          break;
        case 1:
          allocator.expire(1e-6 * 20, ++clock);
          break;
        case 2:
          if (allocator.counts().leased < 0) {
            fail_run("more was settled than leased");
          }
          break;
        case 3:
          v05::RolloutAllocator::restore(allocator.snapshot());
          break;
        default:
          break;
      }
    }
  };
  std::vector<std::thread> threads;
  for (unsigned seed = 0; seed < kThreads; ++seed) {
    threads.emplace_back(work, seed);
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  drain();

  std::size_t rollouts = 0;
  for (const auto& [group, rewards] : collected) {
    rollouts += rewards.size();
    for (std::size_t i = 0; i < rewards.size(); ++i) {
      if (!std::isnan(rewards[i]) && rewards[i] != reward_of(group, static_cast<std::int64_t>(i))) {
        fail_run("a reward went to another rollout");
      }
    }
  }
  const v05::AllocatorCounts counts = allocator.counts();
  if (collected.size() != kGroups || counts.leased != 0 || counts.queued != 0 || counts.unknown != 0) {
    fail_run("something is left over");
  }
  if (static_cast<std::size_t>(counts.reported + counts.invalid) != rollouts) {
    fail_run("a rollout was not counted once");
  }
  return rollouts;
}

}  // namespace

int main() {
  run({.rule = v05::BudgetRule::kOsla});
  run({.rule = v05::BudgetRule::kCalibrated,
       .calibration = v05::Calibration{.alpha = 0.1, .beta = 0.9, .kappa = 4.0, .eps = 0.1}});
  if (run({.rule = v05::BudgetRule::kTotal, .total = 9 * kGroups}) != 9 * kGroups) {
    fail_run("the total was not kept");
  }
  std::printf("ok\n");
}
