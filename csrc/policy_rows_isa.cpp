// Row kernels on the CPU for one instruction set: CMake compiles this file once for each, with ARFT_ISA naming it.
//
// A row is read three times (largest logit, sums, gradient) while it lies in the L2 cache. The sums leave exp(d_j) in the
// place of the gradient where that is a multiple of it; a softcap or an entropy term needs the logit again.
// `omp simd` lets the reductions vectorise without -ffast-math; threads are not used here.

#include <algorithm>

#include "policy_row.h"

namespace arft {
namespace ARFT_ISA {
namespace {

// Elements that are summed in the lanes of S before they join a sum in double.
constexpr int64_t kBlock = 1024;

template <class S, bool biased>
inline S with_bias(const S* x, const S* bias, int64_t j) {
  return biased ? x[j] + bias[j] : x[j];
}

template <class S, bool biased>
S largest(const S* x, const S* bias, int64_t begin, int64_t end) {
  S top = -S(INFINITY);
#pragma omp simd reduction(max : top)
  for (int64_t j = begin; j < end; ++j) {
    const S value = with_bias<S, biased>(x, bias, j);
    top = value > top ? value : top;
  }
  return top;
}

struct Sums {
  double sum = 0.0, weighted = 0.0;
};

// `kept`: where exp(d_j) stays; may be `x`. The transform comes by value: a store cannot change it then.
template <class S, bool biased, bool capped, bool keep>
void add(Sums& sums, const S* x, const S* bias, int64_t begin, int64_t end, S base, const Transform<S> f, S* kept) {
  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t stop = start + kBlock < end ? start + kBlock : end;
    S sum = 0, weighted = 0;
#pragma omp simd reduction(+ : sum, weighted)
    for (int64_t j = start; j < stop; ++j) {
      const S d = exponent(reduced(f, with_bias<S, biased>(x, bias, j), capped).z, base, f.k);
      const S e = exp_(d);
      sum += e;
      weighted += e * d;
      if (keep) kept[j] = e;
    }
    sums.sum += double(sum);
    sums.weighted += double(weighted);
  }
}

template <class S, bool biased, bool capped, bool keep>
Others<S> others(const S* x, const S* bias, int64_t vocabulary, int64_t token, const Transform<S>& f, S* kept) {
  const S below = largest<S, biased>(x, bias, 0, token), above = largest<S, biased>(x, bias, token + 1, vocabulary);
  const S top = reduced(f, below > above ? below : above, capped).z;  // tanh rises: the largest x has the largest z
  Sums sums;
  add<S, biased, capped, keep>(sums, x, bias, 0, token, base(top), f, kept);
  add<S, biased, capped, keep>(sums, x, bias, token + 1, vocabulary, base(top), f, kept);
  return {top, S(sums.sum), S(sums.weighted)};
}

// `x` and `out` may be the same row. The constants come by value: a store to `out` cannot change them then.
template <class S, bool biased, bool capped>
void write_gradient(const S* x, const S* bias, int64_t vocabulary, S base, const Transform<S> f,
                    const Factors<S> factors, S* out) {
#pragma omp simd
  for (int64_t j = 0; j < vocabulary; ++j) {
    out[j] = gradient_element(f, factors, with_bias<S, biased>(x, bias, j), base, capped);
  }
}

template <class S>
void scale(S* values, int64_t count, S factor) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) values[j] *= factor;
}

template <class S>
S at(const void* values, int64_t i) {
  return values ? static_cast<const S*>(values)[i] : S(0);
}

template <class S>
void put(void* values, int64_t i, S value) {
  if (values) static_cast<S*>(values)[i] = value;
}

template <class S, bool biased, bool capped>
void run(const arft_rows& rows, const arft_transform& transform, const arft_row_objective* objective, int64_t begin,
         int64_t end) {
  const Transform<S> f = make_transform<S>(transform);
  const Objective<S> o = objective ? make_objective<S>(*objective, rows) : Objective<S>{};
  const S* bias = static_cast<const S*>(rows.bias);
  const bool entropy_term = objective ? o.entropy_coef != S(0) : rows.entropy_weight != nullptr;
  const bool keep = rows.gradient && !capped && !entropy_term;
  for (int64_t i = begin; i < end; ++i) {
    const S* x = static_cast<const S*>(rows.logits) + i * rows.logits_stride;
    S* out = static_cast<S*>(rows.gradient) + (rows.gradient ? i * rows.gradient_stride : 0);
    S g = 0, e = 0;
    if (rows.gradient && !objective) {
      g = at<S>(rows.coefficient, i);
      e = at<S>(rows.entropy_weight, i);
      if (g == S(0) && e == S(0)) {
        std::fill_n(out, rows.vocabulary, S(0));
        continue;
      }
    }

    const int64_t token = rows.token_ids[i];
    const Reduced<S> own = reduced(f, with_bias<S, biased>(x, bias, token), capped);
    const Others<S> rest = keep ? others<S, biased, capped, true>(x, bias, rows.vocabulary, token, f, out)
                                : others<S, biased, capped, false>(x, bias, rows.vocabulary, token, f, nullptr);
    const Row<S> row = with_token(rest, own.z, f.k);
    put(rows.logprobs, i, row.logp);
    put(rows.entropy, i, row.entropy);
    if (!rows.gradient) continue;

    if (objective) {
      const RowInputs<S> inputs = {at<S>(rows.advantage, i), at<S>(rows.scale, i), at<S>(rows.old_logprobs, i),
                                   at<S>(rows.ref_logprobs, i), at<S>(rows.sampler_logprobs, i)};
      g = coefficient(o, inputs, row.logp);
      e = -o.entropy_coef * inputs.scale;
      put(rows.coefficient, i, g);
      if (g == S(0) && e == S(0)) {
        std::fill_n(out, rows.vocabulary, S(0));
        continue;
      }
    }
    const Factors<S> factors = gradient_factors(row, f, g, e, own.slope);
    if (keep) {
      scale(out, rows.vocabulary, factors.constant * exp_(exponent(rest.top, row.base, f.k)));
    } else {
      write_gradient<S, biased, capped>(x, bias, rows.vocabulary, row.base, f, factors, out);
    }
    out[token] = factors.token;
  }
}

template <class S>
void dispatch(const arft_rows& rows, const arft_transform& transform, const arft_row_objective* objective,
              int64_t begin, int64_t end) {
  const bool capped = transform.softcap > 0;
  const auto chosen = rows.bias ? (capped ? run<S, true, true> : run<S, true, false>)
                                : (capped ? run<S, false, true> : run<S, false, false>);
  chosen(rows, transform, objective, begin, end);
}

}  // namespace

void rows_f32(const arft_rows& rows, const arft_transform& transform, const arft_row_objective* objective,
              int64_t begin, int64_t end) {
  dispatch<float>(rows, transform, objective, begin, end);
}

void rows_f64(const arft_rows& rows, const arft_transform& transform, const arft_row_objective* objective,
              int64_t begin, int64_t end) {
  dispatch<double>(rows, transform, objective, begin, end);
}

}  // namespace ARFT_ISA
}  // namespace arft
