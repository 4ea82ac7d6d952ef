// Over vLLM's paged KV cache, on processors with AVX-512: the attention of chosen tokens, and chunks' KV rotated and
// written straight from where it lies. In fp32, and in bf16 where the processor has products of it.
// attention.py declares what is called from outside.

#include <immintrin.h>
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int kTile = 64;   // tokens of the KV cache that are packed and attended to at a time
constexpr int kRows = 6;    // rows of a group: 6 x 4 sums in registers, 8 registers left
constexpr int kLanes = 16;  // fp32 in a register
constexpr float kLowest = std::numeric_limits<float>::lowest();

// How numbers of a kind are multiplied: `kPacked` of them at a time for each lane of the sums. A lane's lie side by
// side in packed rows; a row that is broadcast has them so anyway.
struct Fp32 {
    using T = float;
    static constexpr int kPacked = 1;

    static __m512 multiply_add(__m512 sum, const T* row, int64_t i, const T* lanes) {
        return _mm512_fmadd_ps(_mm512_set1_ps(row[i]), _mm512_loadu_ps(lanes), sum);
    }
    static void pack(const T* const* rows, T* packed) {
        _mm512_storeu_ps(packed, _mm512_loadu_ps(rows[0]));
        _mm512_storeu_ps(packed + kLanes, _mm512_loadu_ps(rows[0] + kLanes));
    }
    static __m512 load(const T* from) { return _mm512_loadu_ps(from); }
    static void store(__m512 x, T* to) { _mm512_storeu_ps(to, x); }
    static T of(float x) { return x; }
    static float as_float(T x) { return x; }
};

struct Bf16 {
    using T = uint16_t;
    static constexpr int kPacked = 2;

    static __m512 multiply_add(__m512 sum, const T* row, int64_t i, const T* lanes) {
        int32_t pair;
        std::memcpy(&pair, row + 2 * i, sizeof pair);
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)_mm512_loadu_si512(lanes));
    }
    // Two rows of 32 become one of 32 pairs.
    static void pack(const T* const* rows, T* packed) {
        const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                             37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
        const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
        const __m512i even = _mm512_loadu_si512(rows[0]), odd = _mm512_loadu_si512(rows[1]);
        _mm512_storeu_si512(packed, _mm512_permutex2var_epi16(even, low, odd));
        _mm512_storeu_si512(packed + 32, _mm512_permutex2var_epi16(even, high, odd));
    }
    static __m512 load(const T* from) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    static void store(__m512 x, T* to) { _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(x)); }
    static T of(float x) { return (T)_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set1_ps(x)), 0); }
    static float as_float(T x) {
        const uint32_t bits = (uint32_t)x << 16;
        float wide;
        std::memcpy(&wide, &bits, sizeof wide);
        return wide;
    }
};

// One layer's, as vLLM has it for its `vec` kernels.
template <class Kind>
struct Cache {
    using T = typename Kind::T;
    const T* kv;           // (blocks, H_kv, keys (D, block_size) and then values (block_size, D))
    const int32_t* table;  // the prompt's blocks, in order
    int64_t block_size, num_kv_heads, head_size;

    const T* keys(int64_t token, int64_t head) const {
        return kv + (table[token / block_size] * num_kv_heads + head) * 2 * block_size * head_size;
    }
    const T* values(int64_t token, int64_t head) const { return keys(token, head) + block_size * head_size; }
};

// Keys of a tile, (D / kPacked, 64, kPacked), and values, (64 / kPacked, D, kPacked). From `end` on values are zero and
// not what lies there: no probability makes up for what isn't a number.
template <class Kind, class T = typename Kind::T>
void pack(const Cache<Kind>& cache, int64_t first, int64_t end, int64_t head, T* keys, T* values) {
    static constexpr T kZeros[32] = {};
    constexpr int kPacked = Kind::kPacked;
    const int64_t d = cache.head_size, size = cache.block_size;
    if (end < first + kTile) std::fill(values, values + kTile * d, T{0});
    for (int64_t half = 0; half < std::min<int64_t>(kTile, end - first); half += 32) {
        const int64_t token = first + half, inside = token % size;
        const T *k = cache.keys(token, head) + inside, *v = cache.values(token, head) + inside * d;
        const T* rows[kPacked];
        for (int64_t i = 0; i < d; i += kPacked) {
            for (int p = 0; p < kPacked; ++p) rows[p] = k + (i + p) * size;
            Kind::pack(rows, keys + i * kTile + half * kPacked);
        }
        for (int64_t t = 0; t < 32 && token + t < end; t += kPacked) {
            for (int64_t i = 0; i < d; i += 32) {
                for (int p = 0; p < kPacked; ++p) rows[p] = token + t + p < end ? v + (t + p) * d + i : kZeros;
                Kind::pack(rows, values + (half + t) * d + i * kPacked);
            }
        }
    }
}

// 2^x to 1e-6 relative; 0 far below.
inline __m512 exp2(__m512 x) {
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(1.5403530e-4f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3333558e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

// What six rows have summed: `output` (6, D) by `total`, relative to 2^`greatest`.
struct Sums {
    float *output, *greatest, *total;
};

// Products of six rows with 16 `kColumns` columns of packed ones, added to `sum`; a packed row has `stride` lanes.
template <class Kind, int kColumns, class T = typename Kind::T>
inline void multiply(const T* const* rows, const T* packed, int64_t depth, int64_t stride,
                     __m512 (&sum)[kRows][kColumns]) {
    for (int64_t i = 0; i < depth / Kind::kPacked; ++i)
        for (int r = 0; r < kRows; ++r)
            for (int c = 0; c < kColumns; ++c)
                sum[r][c] = Kind::multiply_add(sum[r][c], rows[r], i, packed + (i * stride + c * kLanes) * Kind::kPacked);
}

template <class Kind, int kColumns, class T = typename Kind::T>
inline void add_values(const T* const* probabilities, const T* values, int64_t head_size, const float* correction,
                       float* output) {
    __m512 sum[kRows][kColumns];
    for (int r = 0; r < kRows; ++r)
        for (int c = 0; c < kColumns; ++c)
            sum[r][c] =
                _mm512_mul_ps(_mm512_loadu_ps(output + r * head_size + c * kLanes), _mm512_set1_ps(correction[r]));
    multiply<Kind, kColumns>(probabilities, values, kTile, head_size, sum);
    for (int r = 0; r < kRows; ++r)
        for (int c = 0; c < kColumns; ++c) _mm512_storeu_ps(output + r * head_size + c * kLanes, sum[r][c]);
}

// Six rows over one tile, of whose tokens each row sees those from `begins` up to `ends`. A row that sees none sums what
// counts nothing later, and nothing after it has summed something.
template <class Kind, class T = typename Kind::T>
void attend_tile(const T* const* queries, const int64_t* begins, const int64_t* ends, const T* keys, const T* values,
                 int64_t head_size, float scale, const Sums& sums) {
    __m512 score[kRows][4] = {};
    multiply<Kind, 4>(queries, keys, head_size, kTile, score);
    alignas(64) T probabilities[kRows * kTile];
    const T* of_rows[kRows];
    float correction[kRows];
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (int r = 0; r < kRows; ++r) {
        auto& row = score[r];
        for (auto& part : row) part = _mm512_mul_ps(part, _mm512_set1_ps(scale));
        if (begins[r] > 0 || ends[r] < kTile) {
            const __m512i begin = _mm512_set1_epi32((int)std::clamp<int64_t>(begins[r], 0, kTile));
            const __m512i end = _mm512_set1_epi32((int)std::clamp<int64_t>(ends[r], 0, kTile));
            for (int c = 0; c < 4; ++c) {
                const __m512i places = _mm512_add_epi32(lanes, _mm512_set1_epi32(c * kLanes));
                const __mmask16 seen = _mm512_mask_cmplt_epi32_mask(_mm512_cmpge_epi32_mask(places, begin), places, end);
                row[c] = _mm512_mask_blend_ps(seen, _mm512_set1_ps(kLowest), row[c]);
            }
        }
        const __m512 pairs[] = {_mm512_max_ps(row[0], row[1]), _mm512_max_ps(row[2], row[3])};
        const float before = sums.greatest[r];
        const float now = std::max(before, _mm512_reduce_max_ps(_mm512_max_ps(pairs[0], pairs[1])));
        for (auto& part : row) part = exp2(_mm512_sub_ps(part, _mm512_set1_ps(now)));
        correction[r] = _mm512_cvtss_f32(exp2(_mm512_set1_ps(before - now)));
        const __m512 all = _mm512_add_ps(_mm512_add_ps(row[0], row[1]), _mm512_add_ps(row[2], row[3]));
        sums.greatest[r] = now;
        sums.total[r] = sums.total[r] * correction[r] + _mm512_reduce_add_ps(all);
        of_rows[r] = probabilities + r * kTile;
        for (int c = 0; c < 4; ++c) Kind::store(row[c], probabilities + r * kTile + c * kLanes);
    }
    int64_t done = 0;
    for (; done + 64 <= head_size; done += 64)
        add_values<Kind, 4>(of_rows, values + done * Kind::kPacked, head_size, correction, sums.output + done);
    for (; done < head_size; done += 32)
        add_values<Kind, 2>(of_rows, values + done * Kind::kPacked, head_size, correction, sums.output + done);
}

}  // namespace

// The chosen tokens and their model: attention.py has the same.
struct Attention {
    const void* queries;     // (T, H, D); a token's heads lie side by side, tokens `query_stride` apart
    const void* kv;          // `Cache::kv`
    const int32_t* table;    // `Cache::table`
    const int64_t* positions;  // (T), in order
    void* output;            // (T, H, D)
    int64_t query_stride, output_stride, num_tokens, num_heads, num_kv_heads, head_size, block_size, block_tokens;
    int64_t window;          // how many tokens each sees, itself included
    double scale;
};

// Where the tokens go in a layer's cache, and by what its keys are rotated; without pairs they stay as they are.
struct Layer {
    void* kv;
    const int64_t* slots;    // (T)
    const float *cos, *sin;  // (T, pairs)
    int64_t num_pairs, is_neox;
};

// Some of a chunk's tokens: KV (2, L, t, H_kv * D), the last dimension without gaps.
struct Part {
    const void* kv;
    int64_t num_tokens, kv_stride, layer_stride, token_stride;
};

namespace {

template <class Kind>
void attend(const Attention& of) {
    using T = typename Kind::T;
    const int64_t head_size = of.head_size, shared = of.num_heads / of.num_kv_heads;
    const Cache<Kind> cache{(const T*)of.kv, of.table, of.block_size, of.num_kv_heads, head_size};
    const int64_t num_blocks = (of.num_tokens + of.block_tokens - 1) / of.block_tokens;
    const float scale = (float)(of.scale * 1.4426950408889634);  // exponents of 2, not of e
#pragma omp parallel
    {
        const int64_t rows = (of.block_tokens * shared + kRows - 1) / kRows * kRows;
        std::vector<float> memory(rows * (head_size + 2));
        std::vector<T> packed(2 * kTile * head_size);
        T *const keys = packed.data(), *const values = keys + kTile * head_size;
        std::vector<const T*> of_row(rows);
        std::vector<int64_t> seen_from(rows), last(rows);
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < num_blocks * of.num_kv_heads; ++item) {
            // The longest first: the last blocks, which see the most.
            const int64_t head = item % of.num_kv_heads, block = num_blocks - 1 - item / of.num_kv_heads;
            const int64_t start = block * of.block_tokens;
            const int64_t count = std::min(of.block_tokens, of.num_tokens - start) * shared;
            const int64_t padded = (count + kRows - 1) / kRows * kRows;
            float *const sums = memory.data(), *const greatest = sums + rows * head_size;
            float* const total = greatest + rows;
            std::fill(sums, sums + padded * head_size, 0.f);
            std::fill(greatest, greatest + padded, kLowest);
            std::fill(total, total + padded, 0.f);
            for (int64_t row = 0; row < padded; ++row) {
                const int64_t own = std::min(row, count - 1), token = start + own / shared;
                of_row[row] =
                    (const T*)of.queries + token * of.query_stride + (head * shared + own % shared) * head_size;
                last[row] = of.positions[token];
                seen_from[row] = std::max<int64_t>(last[row] + 1 - of.window, 0);
            }
            int64_t begin = 0, end = 0;  // rows before `begin` see nothing more, and those from `end` on nothing yet
            for (int64_t first = seen_from[0] / kTile * kTile; first <= last[padded - 1]; first += kTile) {
                while (last[begin + kRows - 1] < first) begin += kRows;
                while (end < padded && seen_from[end] < first + kTile) end += kRows;
                if (begin >= end) continue;
                pack<Kind>(cache, first, last[padded - 1] + 1, head, keys, values);
                for (int64_t row = begin; row < end; row += kRows) {
                    int64_t begins[kRows], ends[kRows];
                    for (int r = 0; r < kRows; ++r) {
                        begins[r] = seen_from[row + r] - first;
                        ends[r] = last[row + r] + 1 - first;
                    }
                    attend_tile<Kind>(&of_row[row], begins, ends, keys, values, head_size, scale,
                                      {sums + row * head_size, greatest + row, total + row});
                }
            }
            for (int64_t row = 0; row < count; ++row) {
                const int64_t token = start + row / shared;
                T* out = (T*)of.output + token * of.output_stride + (head * shared + row % shared) * head_size;
                const __m512 by = _mm512_set1_ps(1.f / total[row]);
                for (int64_t i = 0; i < head_size; i += kLanes)
                    Kind::store(_mm512_mul_ps(_mm512_loadu_ps(sums + row * head_size + i), by), out + i);
            }
        }
    }
}

// One token's keys of one head; the sums are made in fp32.
template <class Kind, class T = typename Kind::T>
void rotate(const T* from, const float* cos, const float* sin, int64_t pairs, bool is_neox, int64_t head_size, T* to) {
    int64_t i = 0;
    for (; is_neox && i + kLanes <= pairs; i += kLanes) {
        const __m512 a = Kind::load(from + i), b = Kind::load(from + i + pairs);
        const __m512 c = _mm512_loadu_ps(cos + i), s = _mm512_loadu_ps(sin + i);
        Kind::store(_mm512_fnmadd_ps(b, s, _mm512_mul_ps(a, c)), to + i);
        Kind::store(_mm512_fmadd_ps(a, s, _mm512_mul_ps(b, c)), to + i + pairs);
    }
    for (; i < pairs; ++i) {
        const int64_t first = is_neox ? i : 2 * i, second = is_neox ? i + pairs : 2 * i + 1;
        const float a = Kind::as_float(from[first]), b = Kind::as_float(from[second]);
        to[first] = Kind::of(a * cos[i] - b * sin[i]);
        to[second] = Kind::of(b * cos[i] + a * sin[i]);
    }
    std::copy(from + 2 * pairs, from + head_size, to + 2 * pairs);
}

// One layer of a part, whose first token is the number `before` of all.
template <class Kind, class T = typename Kind::T>
void place(const Layer& layer, const Part& part, int64_t number, int64_t before, int64_t num_kv_heads,
           int64_t head_size, int64_t block_size) {
    const int64_t heads_size = num_kv_heads * head_size;
    const T *keys = (const T*)part.kv + number * part.layer_stride, *values = keys + part.kv_stride;
    std::vector<T> moved(32 * heads_size);
    for (int64_t start = 0, end; start < part.num_tokens; start = end) {
        // Up to 32 tokens that follow each other in one block.
        const int64_t* slots = layer.slots + before + start;
        const int64_t inside = slots[0] % block_size;
        const int64_t most = std::min({part.num_tokens - start, block_size - inside, (int64_t)32});
        int64_t count = 1;
        while (count < most && slots[count] == slots[0] + count) ++count;
        end = start + count;
        for (int64_t t = 0; t < count; ++t) {
            const int64_t at = (before + start + t) * layer.num_pairs;
            for (int64_t h = 0; h < num_kv_heads; ++h)
                rotate<Kind>(keys + (start + t) * part.token_stride + h * head_size, layer.cos + at, layer.sin + at,
                             layer.num_pairs, layer.is_neox, head_size, &moved[t * heads_size + h * head_size]);
        }
        for (int64_t h = 0; h < num_kv_heads; ++h) {
            T* to = (T*)layer.kv + (slots[0] / block_size * num_kv_heads + h) * 2 * block_size * head_size;
            for (int64_t i = 0; i < head_size; ++i)
                for (int64_t t = 0; t < count; ++t)
                    to[i * block_size + inside + t] = moved[t * heads_size + h * head_size + i];
            to += (block_size + inside) * head_size;
            for (int64_t t = 0; t < count; ++t) {
                const T* own = values + (start + t) * part.token_stride + h * head_size;
                std::copy(own, own + head_size, to + t * head_size);
            }
        }
    }
}

}  // namespace

// Each chosen token attends to all of its prompt up to itself. The query heads of one KV head and the tokens of a block
// are rows of one product, each with its own causal bound. Softmax is online, as in FlashAttention (arXiv 2205.14135),
// in fp32; probabilities are rounded to the cache's kind for the product with the values.
extern "C" void attend(const Attention* of, int64_t is_bf16) {
    is_bf16 ? attend<Bf16>(*of) : attend<Fp32>(*of);
}

extern "C" void place(const Layer* layers, int64_t num_layers, const Part* parts, int64_t num_parts,
                      int64_t num_kv_heads, int64_t head_size, int64_t block_size, int64_t is_bf16) {
#pragma omp parallel for collapse(2) schedule(dynamic, 1)
    for (int64_t number = 0; number < num_layers; ++number) {
        for (int64_t part = 0; part < num_parts; ++part) {
            int64_t before = 0;
            for (int64_t i = 0; i < part; ++i) before += parts[i].num_tokens;
            (is_bf16 ? place<Bf16> : place<Fp32>)(layers[number], parts[part], number, before, num_kv_heads, head_size,
                                                  block_size);
        }
    }
}
