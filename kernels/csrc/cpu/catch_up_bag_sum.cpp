#include "cpu/catch_up_bag_sum.h"

#include <vector>

#include "cpu/row_ranges.h"
#include "cpu/simd_level.h"

namespace lazydp::cpu {
namespace {

enum class Bags { kNone, kNotSingle, kAll };

// One job, and which of its bags are left once its rows have caught up.
struct Plan {
  CatchUp catch_up;
  std::vector<float*> copies;
  Bags left;

  explicit Plan(const CatchUpBagSum& job) : catch_up(job.catch_up) {
    const int64_t single = single_bags(job.sum);
    left = 2 * single < job.sum.bags ? Bags::kAll : single < job.sum.bags ? Bags::kNotSingle : Bags::kNone;
    if (left == Bags::kAll) return;
    copies.resize(catch_up.count);
    catch_up.copies = copies.data();
  }
  Plan(const Plan&) = delete;
};

}  // namespace

// A row that catches up goes to the bags that read nothing else, that of its first lookup while it is in registers; other bags
// come later.
void catch_up_bag_sum(std::span<const CatchUpBagSum> jobs, const Parallel& parallel) {
  const NoiseKernels kernels = noise_kernels();
  std::vector<Plan> plans(jobs.begin(), jobs.end());
  RowRanges rows(parallel);
  JobRanges bags(parallel);
  for (size_t j = 0; j < jobs.size(); ++j) {
    rows.add(j, plans[j].catch_up.count, plans[j].catch_up.columns);
    if (plans[j].left != Bags::kNone) bags.add(j, jobs[j].sum.bags, rows_per_task(jobs[j].sum.columns));
  }
  rows.each([&](int64_t j, int64_t begin, int64_t end) {
    Plan& plan = plans[j];
    if (plan.catch_up.copies) single_bags_of_rows(jobs[j].sum, jobs[j].groups, begin, end, plan.copies.data());
    kernels.catch_up(plan.catch_up, begin, end);
    if (plan.catch_up.copies) rows_to_other_single_bags(jobs[j].sum, jobs[j].groups, begin, end, plan.catch_up.copies);
  });
  bags.each([&](int64_t j, int64_t begin, int64_t end) {
    (plans[j].left == Bags::kAll ? sum_bags : sum_bags_but_single)(jobs[j].sum, begin, end);
  });
}

}  // namespace lazydp::cpu
