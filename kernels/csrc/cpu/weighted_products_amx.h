// Weighted products on AMX, the matrix unit of recent Intel processors. Their order of additions, and so their bits, are not those
// of the other instruction sets.
#pragma once

#include "cpu/parallel.h"
#include "cpu/weighted_products.h"

namespace lazydp::cpu {

// Whether this machine has the unit, and the operating system lets this process use it.
bool can_use_amx();

// A block of fewer units leaves most of a register of 32 units empty: other instructions are then faster.
inline constexpr int64_t kLeastAmxBlock = 16;

// What `weighted_product` does, for a job of at least one unit, output and column. Numbers of float32 are cut into three of
// bfloat16, towards 0: high, middle and low. In a block the units are taken in groups of 32. For each group, the instruction
// TDPBF16PS adds six products to the sum of the block, one after the other: low high, middle high, middle middle, high middle,
// high low, high high (of gradients and inputs). Each of them is a chain of fused multiply-adds from 0 over the units at even
// places, plus such a chain over those at odd places. Numbers below the least normal one are taken, and given, as 0. The products
// that are left out are below 2^-20 of the whole, and of its sign.
void weighted_product_amx(const WeightedProduct& job, const Parallel& parallel);

}  // namespace lazydp::cpu
