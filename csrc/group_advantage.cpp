// Group-relative advantages on the CPU; arft.h states the identity. Rows and groups are few (thousands): what counts is
// that no Python runs between the rows, not the arithmetic.

#include "arft.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Rewards {
  const float* values;
  const float* weights;
  const int64_t* gate_by;
  const float* gate_threshold;
  int64_t components;

  double weight(int64_t k) const { return weights ? double(weights[k]) : 1.0; }

  // NaN where component k does not apply, 0 where its gate is shut. A NaN gate is below nothing: it stays open.
  float value(int64_t row, int64_t k) const {
    const float* r = values + row * components;
    if (!gate_by || gate_by[k] < 0 || std::isnan(r[k])) return r[k];
    return r[gate_by[k]] < gate_threshold[k] ? 0.0f : r[k];
  }

  // The weighted sum over the components that apply, NaN when none does. Rounding to float makes rows tie whose
  // components add up to the same value in another order.
  float combined(int64_t row) const {
    double sum = 0.0;
    bool valid = false;
    for (int64_t k = 0; k < components; ++k) {
      const float v = value(row, k);
      if (std::isnan(v)) continue;
      valid = true;
      sum += weight(k) * double(v);
    }
    return valid ? float(sum) : std::numeric_limits<float>::quiet_NaN();
  }
};

struct Moments {
  int64_t count;
  double mean;
  double std;
};

// Of value(begin) .. value(end - 1), NaN left out, in two passes. Equal values have exactly their value as mean: a
// rounding error there would become an advantage after the division by epsilon alone.
template <typename Value>
Moments moments(int64_t begin, int64_t end, Value value) {
  int64_t count = 0;
  double sum = 0.0, low = kInfinity, high = -kInfinity;
  for (int64_t i = begin; i < end; ++i) {
    const double v = value(i);
    if (std::isnan(v)) continue;
    ++count;
    sum += v;
    low = std::min(low, v);
    high = std::max(high, v);
  }
  if (count == 0) return {0, kNaN, 0.0};
  if (low == high) return {count, low, 0.0};
  const double mean = sum / double(count);
  double squares = 0.0;
  for (int64_t i = begin; i < end; ++i) {
    const double v = value(i);
    if (!std::isnan(v)) squares += (v - mean) * (v - mean);
  }
  return {count, mean, std::sqrt(squares / double(count - 1))};
}

// sum[i] += weight * N(value)_i in every group, N as in arft.h.
template <typename Value>
void add_normalized(const int64_t* offsets, int64_t groups, const arft_normalization& rule, double weight, Value value,
                    double* sum) {
  const int64_t rows = offsets[groups];
  const double batch_std = rule.scale == ARFT_SCALE_BATCH ? moments(0, rows, value).std : 0.0;
#pragma omp parallel for if (rows > 65536)
  for (int64_t g = 0; g < groups; ++g) {
    const Moments m = moments(offsets[g], offsets[g + 1], value);
    const double baseline = rule.center == ARFT_CENTER_NONE ? 0.0 : m.mean;
    // r - (n mean - r) / (n - 1) = n / (n - 1) (r - mean): the others' mean without a second sum.
    const double others =
        rule.center == ARFT_CENTER_LEAVE_ONE_OUT && m.count > 1 ? double(m.count) / double(m.count - 1) : 1.0;
    const double spread = std::max(rule.scale == ARFT_SCALE_BATCH ? batch_std : m.std, rule.std_floor);
    const double divisor = rule.scale == ARFT_SCALE_NONE ? 1.0 : spread + rule.epsilon;
    for (int64_t i = offsets[g]; i < offsets[g + 1]; ++i) {
      const double v = value(i);
      if (!std::isnan(v)) sum[i] += weight * ((v - baseline) * others / divisor);
    }
  }
}

arft_status check(const Rewards& rewards, const int64_t* offsets, int64_t rows, int64_t groups,
                  const arft_normalization* rule, const double* scratch, const float* advantages, const float* mean,
                  const float* std, const uint8_t* no_signal) {
  if (rows < 0 || groups < 0 || rewards.components < 1) return ARFT_BAD_SIZE;
  if (!offsets || !rule) return ARFT_NULL_POINTER;
  if (rows > 0 && (!rewards.values || !scratch || !advantages)) return ARFT_NULL_POINTER;
  if (groups > 0 && (!mean || !std || !no_signal)) return ARFT_NULL_POINTER;
  if (rewards.gate_by && !rewards.gate_threshold) return ARFT_NULL_POINTER;
  if (offsets[0] != 0 || offsets[groups] != rows) return ARFT_BAD_OFFSETS;
  for (int64_t g = 0; g < groups; ++g) {
    if (offsets[g] > offsets[g + 1]) return ARFT_BAD_OFFSETS;
  }
  if (rule->center < ARFT_CENTER_NONE || rule->center > ARFT_CENTER_LEAVE_ONE_OUT) return ARFT_BAD_RULE;
  if (rule->scale < ARFT_SCALE_NONE || rule->scale > ARFT_SCALE_BATCH) return ARFT_BAD_RULE;
  if (rule->order < ARFT_SUM_THEN_NORMALIZE || rule->order > ARFT_NORMALIZE_THEN_SUM) return ARFT_BAD_RULE;
  if (!(rule->std_floor >= 0.0) || std::isinf(rule->std_floor)) return ARFT_BAD_RULE;
  if (!(rule->epsilon > 0.0) || std::isinf(rule->epsilon)) return ARFT_BAD_EPSILON;
  for (int64_t k = 0; rewards.gate_by && k < rewards.components; ++k) {
    if (rewards.gate_by[k] < -1 || rewards.gate_by[k] >= rewards.components) return ARFT_BAD_GATE;
  }
  return ARFT_OK;
}

}  // namespace

int32_t arft_abi_version(void) { return ARFT_ABI_VERSION; }

int32_t arft_group_advantage_f32(const float* rewards, const float* weights, const int64_t* gate_by,
                                 const float* gate_threshold, const int64_t* offsets, int64_t rows, int64_t components,
                                 int64_t groups, const arft_normalization* rule, double* scratch, float* advantages,
                                 float* mean, float* std, uint8_t* no_signal) {
  const Rewards table{rewards, weights, gate_by, gate_threshold, components};
  const arft_status status =
      check(table, offsets, rows, groups, rule, scratch, advantages, mean, std, no_signal);
  if (status != ARFT_OK) return status;

  // `advantages` holds the combined rewards, NaN for rows that are left out, until the last loop; `scratch` adds up A.
#pragma omp parallel for if (rows * components > 65536)
  for (int64_t i = 0; i < rows; ++i) {
    advantages[i] = table.combined(i);
    scratch[i] = 0.0;
  }
  const auto combined = [&](int64_t i) { return double(advantages[i]); };
  if (rule->order == ARFT_SUM_THEN_NORMALIZE) {
    add_normalized(offsets, groups, *rule, 1.0, combined, scratch);
  } else {
    for (int64_t k = 0; k < components; ++k) {
      const auto component = [&](int64_t i) { return double(table.value(i, k)); };
      add_normalized(offsets, groups, *rule, table.weight(k), component, scratch);
    }
  }

  double shift = 0.0, divisor = 1.0;
  if (rule->whiten) {
    const auto advantage = [&](int64_t i) { return std::isnan(advantages[i]) ? kNaN : scratch[i]; };
    const Moments batch = moments(0, rows, advantage);
    // Centred values have mean 0; subtracting its rounding error would blur the exact zeros.
    if (rule->center == ARFT_CENTER_NONE) shift = batch.mean;
    divisor = batch.std + rule->epsilon;
  }
#pragma omp parallel for if (rows > 65536)
  for (int64_t g = 0; g < groups; ++g) {
    const Moments m = moments(offsets[g], offsets[g + 1], combined);
    mean[g] = float(m.mean);
    std[g] = float(m.std);
    bool signal = false;
    for (int64_t i = offsets[g]; i < offsets[g + 1]; ++i) {
      advantages[i] = std::isnan(advantages[i]) ? 0.0f : float((scratch[i] - shift) / divisor);
      signal |= advantages[i] != 0.0f;
    }
    no_signal[g] = !signal;
  }
  return ARFT_OK;
}
