// The maths of one row, one definition for CPU and CUDA, in float or double. arft_fast/kernels/rows.py states what is
// computed; here is how it keeps its digits.
//
// A logit is y = k z with a "reduced logit" z: x + bias, or its tanh under a softcap. Exponents are taken as
// d = k (z - base) with a base among the z: the difference comes before the product, so that large logits cost nothing.
// The token's own logit stays out of the sums and joins at the end: 1 - p_t is then a sum, never a difference.
#ifndef ARFT_POLICY_ROW_H
#define ARFT_POLICY_ROW_H

#include "arft.h"
#include "vector_math.h"

namespace arft {
namespace ARFT_ISA {

template <class S>
ARFT_HD S clamp_(S x, S low, S high) {
  return x < low ? low : x > high ? high : x;
}

// ---- From a raw product to a logit ----

template <class S>
struct Transform {
  S squeeze;  // z = tanh(squeeze (x + bias)) if capped, else x + bias
  S k;        // y = k z
  S slope;    // dy/dx = slope dtanh, or slope
  bool capped;
};

template <class S>
inline Transform<S> make_transform(const arft_transform& t) {
  const bool capped = t.softcap > 0;
  const double slope = t.logit_scale / t.temperature;
  return {S(capped ? t.logit_scale / t.softcap : 1.0), S(capped ? t.softcap / t.temperature : slope), S(slope), capped};
}

template <class S>
struct Reduced {
  S z, slope;  // slope: dz/dx / squeeze
};

// `x` has its bias already; `capped` is f.capped, given apart so that it can be a constant.
template <class S>
ARFT_HD Reduced<S> reduced(const Transform<S>& f, S x, bool capped) {
  if (!capped) return {x, S(1)};
  const Tanh<S> t = tanh_(f.squeeze * x);
  return {x == -S(INFINITY) ? x : t.value, t.slope};
}

// k (z - base), never below what exp_ turns into 0: a forbidden id must not bring 0 * -inf.
template <class S>
ARFT_HD S exponent(S z, S base, S k) {
  return at_least_lowest((z - base) * k);
}

// ---- Softmax statistics ----

// Of the ids other than the token: the largest z, and with d_j = k (z_j - base(top)) the sums of exp(d_j) and of
// exp(d_j) d_j. No ids, or only forbidden ones: {-inf, 0, 0}.
template <class S>
struct Others {
  S top, sum, weighted;
};

template <class S>
ARFT_HD S base(S top) {
  return top == -S(INFINITY) ? S(0) : top;
}

// The same sums from a larger top.
template <class S>
ARFT_HD Others<S> rebase(const Others<S>& others, S top, S k) {
  const S d = exponent(others.top, base(top), k), e = exp_(d);
  return {top, e * others.sum, e * (others.weighted + others.sum * d)};
}

template <class S>
ARFT_HD Others<S> merge(const Others<S>& a, const Others<S>& b, S k) {
  const S top = a.top > b.top ? a.top : b.top;
  const Others<S> l = rebase(a, top, k), r = rebase(b, top, k);
  return {top, l.sum + r.sum, l.weighted + r.weighted};
}

template <class S>
struct Row {
  S base;          // d_j = k (z_j - base)
  S sum, log_sum;  // of exp(d_j) over all ids; p_j = exp(d_j) / sum
  S logp, p, rest; // of the token; rest = 1 - p
  S entropy;
};

template <class S>
ARFT_HD Row<S> with_token(const Others<S>& others, S z, S k) {
  Row<S> row;
  if (z >= others.top) {
    const S d = exponent(others.top, z, k), e = exp_(d), tail = others.sum * e;
    row.base = z;
    row.sum = S(1) + tail;
    row.log_sum = log1p_(tail);
    row.logp = -row.log_sum;
    row.p = S(1) / row.sum;
    row.rest = tail / row.sum;
    row.entropy = row.log_sum - e * (others.weighted + others.sum * d) / row.sum;
  } else {
    row.base = base(others.top);
    const S d = exponent(z, row.base, k), e = exp_(d);
    row.sum = others.sum + e;
    row.log_sum = log_(row.sum);
    row.logp = (z - row.base) * k - row.log_sum;  // not from d: far below the others it is still exact
    row.p = e / row.sum;
    row.rest = others.sum / row.sum;
    row.entropy = row.log_sum - (others.weighted + e * d) / row.sum;
  }
  return row;
}

// ---- The coefficient g = d loss / d logp ----

template <class S>
struct Objective {
  S ratio_low, ratio_high, delta, dual_clip;
  S sapo_positive, sapo_negative;
  S beta, entropy_coef;
  S sampler_low, sampler_high;
  int32_t surrogate, kl, sampler;
  bool kl_correction, has_old, has_kl;
};

template <class S>
inline Objective<S> make_objective(const arft_row_objective& o, const arft_rows& rows) {
  Objective<S> out;
  out.ratio_low = S(o.ratio_low);
  out.ratio_high = S(o.ratio_high);
  out.delta = S(o.delta);
  out.dual_clip = S(o.dual_clip);
  out.sapo_positive = S(o.sapo_positive);
  out.sapo_negative = S(o.sapo_negative);
  out.beta = S(o.beta);
  out.entropy_coef = S(o.entropy_coef);
  out.sampler_low = S(o.sampler_low);
  out.sampler_high = S(o.sampler_high);
  out.surrogate = o.surrogate;
  out.kl = o.kl;
  out.sampler = o.sampler;
  out.kl_correction = o.kl_correction != 0;
  out.has_old = rows.old_logprobs != nullptr;
  out.has_kl = rows.ref_logprobs != nullptr && o.beta > 0;
  return out;
}

// What arrives with a row; what is absent may hold anything.
template <class S>
struct RowInputs {
  S advantage, scale, old, ref, sampler;
};

// Log-ratios are clamped to +-this before exp, as MAX_LOG_RATIO in rows.py.
template <class S>
ARFT_HD S bounded(S log_ratio) {
  return clamp_(log_ratio, S(-20), S(20));
}

// d surrogate / d logp of what is maximised; `moves`: the log-ratio is not clamped.
template <class S>
ARFT_HD S surrogate_slope(const Objective<S>& o, S ratio, bool moves, S advantage) {
  const S band = clamp_(ratio, o.ratio_low, o.ratio_high);
  if (o.surrogate == ARFT_CISPO) return advantage * band;
  if (!moves) return S(0);
  if (o.surrogate == ARFT_SAPO) {
    const S tau = advantage > S(0) ? o.sapo_positive : o.sapo_negative;
    const S e = exp_(at_least_lowest(-abs_(tau * (ratio - S(1)))));  // 4 s (1 - s) is even in its argument
    return S(4) * e / ((S(1) + e) * (S(1) + e)) * ratio * advantage;
  }
  const S capped = ratio > o.delta ? o.delta : ratio;
  const S chosen = capped * advantage <= band * advantage ? capped : band;
  if (advantage < S(0) && chosen * advantage < o.dual_clip * advantage) return S(0);
  return chosen == ratio ? ratio * advantage : S(0);
}

// d KL estimate / d logp.
template <class S>
ARFT_HD S kl_slope(const Objective<S>& o, S d, S ratio, bool moves) {
  S slope, slope_and_value;
  if (o.kl == ARFT_K1) {
    slope = S(1);
    slope_and_value = S(1) - d;
  } else if (o.kl == ARFT_K2) {
    slope = -d;
    slope_and_value = S(0.5) * d * d - d;
  } else {
    const S near = bounded(d), rise = expm1_(near);
    slope = near == d ? -rise : S(0);
    slope_and_value = near == d ? -d : rise - near;  // (1 - e^d) + (e^d - d - 1), the large parts cancelled
  }
  if (!o.kl_correction) return slope;
  return ratio * (moves ? slope_and_value : slope);
}

template <class S>
ARFT_HD S sampler_weight(const Objective<S>& o, S log_ratio) {
  const S v = exp_(bounded(log_ratio));
  if (o.sampler == ARFT_SAMPLER_TRUNCATE) return clamp_(v, o.sampler_low, o.sampler_high);
  return v >= o.sampler_low && v <= o.sampler_high ? v : S(0);
}

template <class S>
ARFT_HD S coefficient(const Objective<S>& o, const RowInputs<S>& in, S logp) {
  if (in.scale == S(0)) return S(0);
  const S log_ratio = o.has_old ? logp - in.old : S(0);
  const bool moves = abs_(log_ratio) <= S(20);
  const S ratio = exp_(bounded(log_ratio));
  S gain = surrogate_slope(o, ratio, moves, in.advantage);
  if (o.sampler != ARFT_SAMPLER_NONE) gain *= sampler_weight(o, logp - in.sampler);
  const S cost = o.has_kl ? o.beta * kl_slope(o, in.ref - logp, ratio, moves) : S(0);
  return in.scale * (cost - gain);
}

// ---- The gradient ----

// gradient_j = exp(d_j) (constant + linear d_j) dtanh_j for j != t, `token` at t; constants of a row.
template <class S>
struct Factors {
  S constant, linear, token;
};

// `dtanh`: the slope of the token's own z.
template <class S>
ARFT_HD Factors<S> gradient_factors(const Row<S>& row, const Transform<S>& f, S g, S e, S dtanh) {
  const S weight = f.slope / row.sum;
  const S own = (g * row.rest - e * row.p * (row.logp + row.entropy)) * f.slope * dtanh;
  return {-(g + e * (row.entropy - row.log_sum)) * weight, -e * weight, row.logp == -S(INFINITY) ? S(0) : own};
}

// `x` as for reduced.
template <class S>
ARFT_HD S gradient_element(const Transform<S>& f, const Factors<S>& factors, S x, S base, bool capped) {
  const Reduced<S> r = reduced(f, x, capped);
  const S d = exponent(r.z, base, f.k);
  return exp_(d) * (factors.constant + factors.linear * d) * r.slope;
}

}  // namespace ARFT_ISA
}  // namespace arft

#endif
