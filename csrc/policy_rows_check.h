// Argument checks that the row kernels of CPU and CUDA share.
#ifndef ARFT_POLICY_ROWS_CHECK_H
#define ARFT_POLICY_ROWS_CHECK_H

#include <cmath>

#include "arft.h"

namespace arft {

inline bool positive(double x) { return x > 0 && std::isfinite(x); }

inline arft_status check(const arft_rows* rows, const arft_transform* transform, const arft_row_objective* objective) {
  if (!rows || !transform) return ARFT_NULL_POINTER;
  if (rows->rows < 0 || rows->vocabulary < 1) return ARFT_BAD_SIZE;
  if (!positive(transform->temperature) || !positive(transform->logit_scale) || !(transform->softcap >= 0) ||
      !std::isfinite(transform->softcap)) {
    return ARFT_BAD_TRANSFORM;
  }
  if (objective) {
    const bool known = objective->surrogate >= ARFT_CLIP && objective->surrogate <= ARFT_SAPO &&
                       objective->kl >= ARFT_K1 && objective->kl <= ARFT_K3 &&
                       objective->sampler >= ARFT_SAMPLER_NONE && objective->sampler <= ARFT_SAMPLER_MASK;
    if (!known) return ARFT_BAD_OBJECTIVE;
  }
  if (rows->rows == 0) return ARFT_OK;

  if (!rows->logits || !rows->token_ids) return ARFT_NULL_POINTER;
  const bool gradients = rows->gradient && !objective;
  if (gradients ? !rows->coefficient : !rows->logprobs || !rows->entropy) return ARFT_NULL_POINTER;
  if (objective) {
    if (!rows->gradient || !rows->coefficient || !rows->advantage || !rows->scale) return ARFT_NULL_POINTER;
    if (objective->sampler != ARFT_SAMPLER_NONE && !rows->sampler_logprobs) return ARFT_NULL_POINTER;
  }
  return ARFT_OK;
}

}  // namespace arft

#endif
