// Group-relative advantages on the CPU; arft.h states the identity. Rows and groups are few (thousands), so the point is
// one pass without Python between the rows, not the arithmetic.

#include "arft.h"

#include <cmath>
#include <limits>

namespace {

// float(sum_k w_k r_k) over the components that are not NaN; NaN when there is none. Rounding to float makes rows tie
// whose components add up to the same value in another order.
float combined_reward(const float* row, const float* weights, int64_t components) {
  double sum = 0.0;
  bool valid = false;
  for (int64_t k = 0; k < components; ++k) {
    if (std::isnan(row[k])) continue;
    valid = true;
    sum += weights ? double(weights[k]) * double(row[k]) : double(row[k]);
  }
  return valid ? float(sum) : std::numeric_limits<float>::quiet_NaN();
}

struct Moments {
  double mean;
  double std;
};

// Two passes over r[0..n), NaN left out. The mean of equal rewards is exact: 24 significant bits each leave room for 2^29
// of them in a double. Their advantages are therefore exactly 0, and not a rounding error divided by epsilon.
Moments moments(const float* r, int64_t n) {
  int64_t valid = 0;
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    if (std::isnan(r[i])) continue;
    ++valid;
    sum += r[i];
  }
  if (valid == 0) return {std::numeric_limits<double>::quiet_NaN(), 0.0};
  const double mean = sum / double(valid);
  if (valid == 1) return {mean, 0.0};
  double squares = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    if (!std::isnan(r[i])) squares += (r[i] - mean) * (r[i] - mean);
  }
  return {mean, std::sqrt(squares / double(valid - 1))};
}

arft_status check(const float* rewards, const int64_t* offsets, int64_t rows, int64_t components, int64_t groups,
                  int32_t scale, double epsilon, const float* advantages, const float* mean, const float* std,
                  const uint8_t* no_signal) {
  if (rows < 0 || groups < 0 || components < 1) return ARFT_BAD_SIZE;
  if (!offsets) return ARFT_NULL_POINTER;
  if (rows > 0 && (!rewards || !advantages)) return ARFT_NULL_POINTER;
  if (groups > 0 && (!mean || !std || !no_signal)) return ARFT_NULL_POINTER;
  if (offsets[0] != 0 || offsets[groups] != rows) return ARFT_BAD_OFFSETS;
  for (int64_t g = 0; g < groups; ++g) {
    if (offsets[g] > offsets[g + 1]) return ARFT_BAD_OFFSETS;
  }
  if (scale != ARFT_SCALE_NONE && scale != ARFT_SCALE_GROUP && scale != ARFT_SCALE_BATCH) return ARFT_BAD_SCALE;
  if (!(epsilon > 0.0) || std::isinf(epsilon)) return ARFT_BAD_EPSILON;
  return ARFT_OK;
}

}  // namespace

int32_t arft_abi_version(void) { return ARFT_ABI_VERSION; }

int32_t arft_group_advantage_f32(const float* rewards, const float* weights, const int64_t* offsets, int64_t rows,
                                 int64_t components, int64_t groups, int32_t scale, double epsilon, float* advantages,
                                 float* mean, float* std, uint8_t* no_signal) {
  const arft_status status = check(rewards, offsets, rows, components, groups, scale, epsilon, advantages, mean, std,
                                   no_signal);
  if (status != ARFT_OK) return status;

  // `advantages` holds the combined rewards until its group turns them into advantages in place.
#pragma omp parallel for if (rows * components > 65536)
  for (int64_t i = 0; i < rows; ++i) {
    advantages[i] = combined_reward(rewards + i * components, weights, components);
  }
  const double batch_std = scale == ARFT_SCALE_BATCH ? moments(advantages, rows).std : 0.0;

#pragma omp parallel for if (rows > 65536)
  for (int64_t g = 0; g < groups; ++g) {
    float* r = advantages + offsets[g];
    const int64_t n = offsets[g + 1] - offsets[g];
    const Moments m = moments(r, n);
    const double divisor = scale == ARFT_SCALE_NONE    ? 1.0
                           : scale == ARFT_SCALE_GROUP ? m.std + epsilon
                                                       : batch_std + epsilon;
    bool signal = false;
    for (int64_t i = 0; i < n; ++i) {
      r[i] = std::isnan(r[i]) ? 0.0f : float((double(r[i]) - m.mean) / divisor);
      signal |= r[i] != 0.0f;
    }
    mean[g] = float(m.mean);
    std[g] = float(m.std);
    no_signal[g] = !signal;
  }
  return ARFT_OK;
}
