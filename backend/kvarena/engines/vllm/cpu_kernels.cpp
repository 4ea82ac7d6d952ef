// Over vLLM's paged KV cache in bf16, on processors with AVX-512 bf16 products: the attention of chosen tokens, and
// chunks' KV rotated and written straight from where it lies. cpu_kernels.py declares what is called from outside.

#include <immintrin.h>
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

using bf16 = uint16_t;

constexpr int kTile = 64;   // tokens of the KV cache that are packed and attended to at a time
constexpr int kRows = 6;    // rows of a group: 6 x 4 sums in registers, 8 registers left
constexpr int kLanes = 16;  // fp32 in a register
constexpr bf16 zeros[32] = {};
constexpr float kLowest = std::numeric_limits<float>::lowest();

// One layer's, as vLLM has it for its `vec` kernels.
struct Cache {
    const bf16* kv;        // (blocks, H_kv, keys (D, block_size) and then values (block_size, D))
    const int32_t* table;  // the prompt's blocks, in order
    int64_t block_size, num_kv_heads, head_size;

    const bf16* keys(int64_t token, int64_t head) const {
        return kv + (table[token / block_size] * num_kv_heads + head) * 2 * block_size * head_size;
    }
    const bf16* values(int64_t token, int64_t head) const { return keys(token, head) + block_size * head_size; }
};

// Two rows of 32 become one of 32 pairs, as the products take them.
inline void interleave(const bf16* even, const bf16* odd, bf16* pairs) {
    static const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38,
                                                6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const __m512i a = _mm512_loadu_si512(even), b = _mm512_loadu_si512(odd);
    _mm512_storeu_si512(pairs, _mm512_permutex2var_epi16(a, low, b));
    _mm512_storeu_si512(pairs + 32, _mm512_permutex2var_epi16(a, high, b));
}

// Keys of a tile as pairs of dimensions (D / 2, 64, 2), values as pairs of tokens (32, D, 2). From `end` on nothing is
// read that must not count: values are zero, for no probability makes up for what isn't a number.
void pack(const Cache& cache, int64_t first, int64_t end, int64_t head, bf16* keys, bf16* values) {
    const int64_t d = cache.head_size, size = cache.block_size;
    if (end < first + kTile) std::fill(values, values + kTile * d, 0);
    for (int64_t half = 0; half < std::min<int64_t>(kTile, end - first); half += 32) {
        const int64_t token = first + half, inside = token % size;
        const bf16* k = cache.keys(token, head) + inside;
        const bf16* v = cache.values(token, head) + inside * d;
        for (int64_t i = 0; i < d / 2; ++i)
            interleave(k + 2 * i * size, k + (2 * i + 1) * size, keys + (i * kTile + half) * 2);
        for (int64_t pair = 0; pair < 16 && token + 2 * pair < end; ++pair)
            for (int64_t i = 0; i < d; i += 32)
                interleave(v + 2 * pair * d + i, token + 2 * pair + 1 < end ? v + (2 * pair + 1) * d + i : zeros,
                           values + ((half / 2 + pair) * d + i) * 2);
    }
}

inline __m512bh as_pairs(__m512i x) { return (__m512bh)x; }

// 2^x to 1e-6 relative; 0 far below.
inline __m512 exp2(__m512 x) {
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(1.3333558e-3f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

// What a block of rows has summed: `output` (rows, D) by `total`, relative to 2^`greatest`.
struct Sums {
    float *output, *greatest, *total;
};

// Six rows over one tile. `bounds`: the tokens of the tile that each row sees, 64 or more for all.
template <int kColumns>
inline void weighted(const bf16* probabilities, const bf16* values, int64_t head_size, float* output,
                     const float* correction) {
    __m512 sum[kRows][kColumns];
    for (int r = 0; r < kRows; ++r)
        for (int c = 0; c < kColumns; ++c)
            sum[r][c] = _mm512_mul_ps(_mm512_loadu_ps(output + r * head_size + c * kLanes),
                                      _mm512_set1_ps(correction[r]));
    for (int pair = 0; pair < kTile / 2; ++pair) {
        __m512bh v[kColumns];
        for (int c = 0; c < kColumns; ++c)
            v[c] = as_pairs(_mm512_loadu_si512(values + (pair * head_size + c * kLanes) * 2));
        for (int r = 0; r < kRows; ++r) {
            const auto p = as_pairs(_mm512_set1_epi32(((const int32_t*)(probabilities + r * kTile))[pair]));
            for (int c = 0; c < kColumns; ++c) sum[r][c] = _mm512_dpbf16_ps(sum[r][c], p, v[c]);
        }
    }
    for (int r = 0; r < kRows; ++r)
        for (int c = 0; c < kColumns; ++c) _mm512_storeu_ps(output + r * head_size + c * kLanes, sum[r][c]);
}

void attend_tile(const bf16* const* queries, const int64_t* bounds, const bf16* keys, const bf16* values,
                 int64_t head_size, float scale, const Sums& sums) {
    __m512 score[kRows][4];
    for (auto& row : score)
        for (auto& part : row) part = _mm512_setzero_ps();
    for (int64_t i = 0; i < head_size / 2; ++i) {
        __m512bh k[4];
        for (int c = 0; c < 4; ++c) k[c] = as_pairs(_mm512_loadu_si512(keys + (i * kTile + c * kLanes) * 2));
        for (int r = 0; r < kRows; ++r) {
            const auto q = as_pairs(_mm512_set1_epi32(((const int32_t*)queries[r])[i]));
            for (int c = 0; c < 4; ++c) score[r][c] = _mm512_dpbf16_ps(score[r][c], q, k[c]);
        }
    }
    alignas(64) bf16 probabilities[kRows * kTile];
    float correction[kRows];
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (int r = 0; r < kRows; ++r) {
        auto& row = score[r];
        for (auto& part : row) part = _mm512_mul_ps(part, _mm512_set1_ps(scale));
        if (bounds[r] < kTile) {
            const __m512i bound = _mm512_set1_epi32((int)std::max<int64_t>(bounds[r], 0));
            for (int c = 0; c < 4; ++c) {
                const __mmask16 sees =
                    _mm512_cmplt_epi32_mask(_mm512_add_epi32(lanes, _mm512_set1_epi32(c * kLanes)), bound);
                row[c] = _mm512_mask_blend_ps(sees, _mm512_set1_ps(kLowest), row[c]);
            }
        }
        const float most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(row[0], row[1]),
                                                              _mm512_max_ps(row[2], row[3])));
        const float before = sums.greatest[r], now = std::max(before, most);
        const __m512 greatest = _mm512_set1_ps(now);
        for (auto& part : row) part = exp2(_mm512_sub_ps(part, greatest));
        correction[r] = _mm512_cvtss_f32(exp2(_mm512_set1_ps(before - now)));
        const float total = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(row[0], row[1]),
                                                               _mm512_add_ps(row[2], row[3])));
        sums.greatest[r] = now;
        sums.total[r] = sums.total[r] * correction[r] + total;
        _mm512_store_si512(probabilities + r * kTile, (__m512i)_mm512_cvtne2ps_pbh(row[1], row[0]));
        _mm512_store_si512(probabilities + r * kTile + 32, (__m512i)_mm512_cvtne2ps_pbh(row[3], row[2]));
    }
    int64_t done = 0;
    for (; done + 64 <= head_size; done += 64)
        weighted<4>(probabilities, values + done * 2, head_size, sums.output + done, correction);
    for (; done < head_size; done += 32)
        weighted<2>(probabilities, values + done * 2, head_size, sums.output + done, correction);
}

// One token's keys of one head, `rotated` of whose dimensions are rotated; the sums are made in fp32.
void rotate(const bf16* from, const float* cos, const float* sin, int64_t rotated, bool is_neox, int64_t head_size,
            bf16* to) {
    const auto at = [&](int64_t i) {
        const uint32_t bits = (uint32_t)from[i] << 16;
        float x;
        std::memcpy(&x, &bits, sizeof x);
        return x;
    };
    const auto put = [&](int64_t i, float x) { to[i] = (bf16)_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set1_ps(x)), 0); };
    const int64_t pairs = rotated / 2;
    int64_t i = 0;
    for (; is_neox && i + kLanes <= pairs; i += kLanes) {
        const auto load = [&](int64_t at) {
            return _mm512_castsi512_ps(
                _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(from + at))), 16));
        };
        const __m512 a = load(i), b = load(i + pairs), c = _mm512_loadu_ps(cos + i), s = _mm512_loadu_ps(sin + i);
        const __m512 first = _mm512_fnmadd_ps(b, s, _mm512_mul_ps(a, c));
        const __m512 second = _mm512_fmadd_ps(a, s, _mm512_mul_ps(b, c));
        _mm256_storeu_si256((__m256i*)(to + i), (__m256i)_mm512_cvtneps_pbh(first));
        _mm256_storeu_si256((__m256i*)(to + i + pairs), (__m256i)_mm512_cvtneps_pbh(second));
    }
    for (; i < pairs; ++i) {
        const int64_t first = is_neox ? i : 2 * i, second = is_neox ? i + pairs : 2 * i + 1;
        const float a = at(first), b = at(second);
        put(first, a * cos[i] - b * sin[i]);
        put(second, b * cos[i] + a * sin[i]);
    }
    std::memcpy(to + rotated, from + rotated, (head_size - rotated) * sizeof(bf16));
}

}  // namespace

// Where the tokens go in a layer's cache, and by what its keys are rotated; without pairs they stay as they are.
struct Layer {
    bf16* kv;
    const int64_t* slots;     // (T)
    const float *cos, *sin;   // (T, pairs)
    int64_t num_pairs, is_neox;
};

// Some of a chunk's tokens: KV (2, L, t, H_kv * D), the last dimension without gaps.
struct Part {
    const bf16* kv;
    int64_t num_tokens, kv_stride, layer_stride, token_stride;
};

extern "C" void place(const Layer* layers, int64_t num_layers, const Part* parts, int64_t num_parts,
                      int64_t num_kv_heads, int64_t head_size, int64_t block_size) {
    const int64_t heads_size = num_kv_heads * head_size;
#pragma omp parallel for collapse(2) schedule(dynamic, 1)
    for (int64_t number = 0; number < num_layers; ++number) {
        for (int64_t part = 0; part < num_parts; ++part) {
            const Layer& layer = layers[number];
            const Part& own = parts[part];
            int64_t before = 0;
            for (int64_t i = 0; i < part; ++i) before += parts[i].num_tokens;
            const bf16 *keys = own.kv + number * own.layer_stride, *values = keys + own.kv_stride;
            std::vector<bf16> moved(32 * heads_size);
            for (int64_t start = 0, end; start < own.num_tokens; start = end) {
                // Up to 32 tokens that lie behind each other in one block.
                const int64_t* slots = layer.slots + before + start;
                const int64_t inside = slots[0] % block_size;
                const int64_t most = std::min({own.num_tokens - start, block_size - inside, (int64_t)32});
                int64_t count = 1;
                while (count < most && slots[count] == slots[0] + count) ++count;
                end = start + count;
                for (int64_t t = 0; t < count; ++t) {
                    const int64_t at = (before + start + t) * layer.num_pairs;
                    for (int64_t h = 0; h < num_kv_heads; ++h)
                        rotate(keys + (start + t) * own.token_stride + h * head_size, layer.cos + at, layer.sin + at,
                               2 * layer.num_pairs, layer.is_neox, head_size, &moved[t * heads_size + h * head_size]);
                }
                for (int64_t h = 0; h < num_kv_heads; ++h) {
                    bf16* to = layer.kv + (slots[0] / block_size * num_kv_heads + h) * 2 * block_size * head_size;
                    for (int64_t i = 0; i < head_size; ++i)
                        for (int64_t t = 0; t < count; ++t)
                            to[i * block_size + inside + t] = moved[t * heads_size + h * head_size + i];
                    to += (block_size + inside) * head_size;
                    for (int64_t t = 0; t < count; ++t)
                        std::memcpy(to + t * head_size, values + (start + t) * own.token_stride + h * head_size,
                                    head_size * sizeof(bf16));
                }
            }
        }
    }
}

// Each chosen token, at its position of the prompt, attends to all of the prompt up to itself: queries and output
// (T, H, D), positions in order. The query heads of one KV head and the tokens of a block are rows of one product, each
// with its own causal bound. Softmax is online, as in FlashAttention (arXiv 2205.14135), in fp32; probabilities are
// rounded to bf16 for the product with the values.
extern "C" void attend(const bf16* queries, int64_t query_stride, const bf16* kv, const int32_t* table,
                       const int64_t* positions, bf16* output, int64_t output_stride, int64_t num_tokens,
                       int64_t num_heads, int64_t num_kv_heads, int64_t head_size, int64_t block_size, float scale,
                       int64_t block_tokens) {
    const Cache cache{kv, table, block_size, num_kv_heads, head_size};
    const int64_t shared = num_heads / num_kv_heads;
    const int64_t num_blocks = (num_tokens + block_tokens - 1) / block_tokens;
    const float scale_2 = scale * 1.44269504f;
#pragma omp parallel
    {
        const int64_t rows = (block_tokens * shared + kRows - 1) / kRows * kRows;
        std::vector<float> memory(rows * (head_size + 2));
        std::vector<bf16> packed(2 * kTile * head_size);
        bf16 *const keys = packed.data(), *const values = keys + kTile * head_size;
        std::vector<const bf16*> of_row(rows);
        std::vector<int64_t> last(rows);
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < num_blocks * num_kv_heads; ++item) {
            // The longest first: the last blocks, which see the most.
            const int64_t head = item % num_kv_heads, block = num_blocks - 1 - item / num_kv_heads;
            const int64_t start = block * block_tokens, count = std::min(block_tokens, num_tokens - start) * shared;
            const int64_t padded = (count + kRows - 1) / kRows * kRows;
            float *const sums = memory.data(), *const greatest = sums + rows * head_size, *const total = greatest + rows;
            std::fill(sums, sums + padded * head_size, 0.f);
            std::fill(greatest, greatest + padded, kLowest);
            std::fill(total, total + padded, 0.f);
            for (int64_t row = 0; row < padded; ++row) {
                const int64_t own = std::min(row, count - 1), token = start + own / shared;
                of_row[row] = queries + token * query_stride + (head * shared + own % shared) * head_size;
                last[row] = positions[token];
            }
            int64_t begin = 0;  // rows before this one see nothing more
            for (int64_t first = 0; first <= last[padded - 1]; first += kTile) {
                while (last[begin + kRows - 1] < first) begin += kRows;
                pack(cache, first, last[padded - 1] + 1, head, keys, values);
                for (int64_t row = begin; row < padded; row += kRows) {
                    int64_t bounds[kRows];
                    for (int r = 0; r < kRows; ++r) bounds[r] = last[row + r] + 1 - first;
                    attend_tile(&of_row[row], bounds, keys, values, head_size, scale_2,
                                {sums + row * head_size, greatest + row, total + row});
                }
            }
            for (int64_t row = 0; row < count; ++row) {
                bf16* out = output + (start + row / shared) * output_stride + (head * shared + row % shared) * head_size;
                const __m512 by = _mm512_set1_ps(1.f / total[row]);
                for (int64_t i = 0; i < head_size; i += kLanes)
                    _mm256_storeu_si256((__m256i*)(out + i),
                                        (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(
                                            _mm512_loadu_ps(sums + row * head_size + i), by)));
            }
        }
    }
}
