// What the C++ of several leaf functions shares. NUMBER is the type of stored numbers: float, or uint16_t for bfloat16.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <omp.h>
#include <vector>
#ifdef __SSE2__
#include <immintrin.h>
#endif

constexpr int64_t TABLE_CHUNK = 16;
constexpr int64_t QUERY_BLOCK = 128;
constexpr int TOGETHER = 4;  // queries of a block that are multiplied together

// Threads are called for so many multiplications or more: to wake one that sleeps takes as long.
constexpr int64_t WORTH_THREADS = 1 << 19;

template <typename To, typename From> inline To bits_of(From x) {
    To bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

// A stored number as float32.
inline float wide(float x) { return x; }
inline float wide(uint16_t x) { return bits_of<float>(uint32_t(x) << 16); }

// A float32 as a stored number, rounded to nearest and ties to even.
template <typename Number> inline Number narrow(float x);
template <> inline float narrow<float>(float x) { return x; }
template <> inline uint16_t narrow<uint16_t>(float x) {
    uint32_t bits = bits_of<uint32_t>(x);
    uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return uint16_t(x != x ? (bits >> 16) | 0x40 : rounded);
}

// e**x of x <= 0, with an error of some 2e-7 of it and of x; 2**-126 is the least. NaN stays NaN.
inline float exponential(float x) {
    float t = x * 1.44269504f;
    t = t < -126.0f ? -126.0f : t;
    // Added to a number below 2**22, it leaves the nearest integer in the last bits. They are read as bits, since a
    // compiler that may reorder sums would take the constant away again.
    constexpr float ROUNDER = 12582912.0f;
    int32_t whole = bits_of<int32_t>(t + ROUNDER) - bits_of<int32_t>(ROUNDER);
    float f = t - float(whole);
    // Taylor's series of 2**f: between -1/2 and 1/2 the rest is below 6e-9, which float32 does not see.
    float p = 1.52527338e-5f;
    p = p * f + 1.54035304e-4f;
    p = p * f + 1.33335581e-3f;
    p = p * f + 9.61812911e-3f;
    p = p * f + 5.55041087e-2f;
    p = p * f + 2.40226507e-1f;
    p = p * f + 6.93147181e-1f;
    p = p * f + 1.0f;
    float result = bits_of<float>(bits_of<uint32_t>(p) + (uint32_t(whole) << 23));
    return x != x ? x : result;
}

// out[:QUERIES, :WIDTH] += factors[:QUERIES, :COUNT] @ rows[:COUNT, :WIDTH]. What is read of a row serves all queries,
// and the sums stay in registers.
template <int QUERIES, int COUNT, int WIDTH>
inline void add_product(float* __restrict out, const float* __restrict factors, const float* __restrict rows) {
    constexpr int LANES = WIDTH % 32 == 0 ? 32 : WIDTH % 16 == 0 ? 16 : WIDTH % 8 == 0 ? 8 : 1;
    for (int i = 0; i < WIDTH; i += LANES) {
        float sums[QUERIES][LANES] = {};
        for (int r = 0; r < COUNT; r++)
            for (int q = 0; q < QUERIES; q++)
#pragma omp simd
                for (int lane = 0; lane < LANES; lane++)
                    sums[q][lane] += factors[q * COUNT + r] * rows[r * WIDTH + i + lane];
        for (int q = 0; q < QUERIES; q++)
            for (int lane = 0; lane < LANES; lane++) out[q * WIDTH + i + lane] += sums[q][lane];
    }
}

// Of x[:count], count > 0. A NaN among them may be passed over.
inline float largest(const float* x, int64_t count) {
    float top = x[0];
#pragma omp simd reduction(max : top)
    for (int64_t n = 0; n < count; n++) top = x[n] > top ? x[n] : top;
    return top;
}

template <int WIDTH, typename Number> inline float dot(const float* x, const Number* y) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < WIDTH; i++) sum += x[i] * wide(y[i]);
    return sum;
}

// out[:WIDTH] += factors[:count] @ rows of stored numbers, of which row(n) tells where the nth is.
template <int WIDTH, typename Row>
inline void add_rows(float* __restrict out, const float* factors, int64_t count, Row row) {
    int64_t n = 0;
    for (; n + 4 <= count; n += 4) {  // out is read and written once for four
        const auto *a = row(n), *b = row(n + 1), *c = row(n + 2), *d = row(n + 3);
#pragma omp simd
        for (int i = 0; i < WIDTH; i++)
            out[i] += (factors[n] * wide(a[i]) + factors[n + 1] * wide(b[i])) +
                      (factors[n + 2] * wide(c[i]) + factors[n + 3] * wide(d[i]));
    }
    for (; n < count; n++) {
        const auto* a = row(n);
#pragma omp simd
        for (int i = 0; i < WIDTH; i++) out[i] += factors[n] * wide(a[i]);
    }
}

// Have numbers come from memory while others are used. Pages lie anywhere, so the processor does not see by itself
// which one is next. A few are asked for at a time, since no more can be on their way.
template <typename Number> inline void fetch(const Number* x, int64_t begin, int64_t end) {
    constexpr int64_t LINE = 64 / int64_t(sizeof(Number));
    for (int64_t i = begin / LINE * LINE; i < end; i += LINE) __builtin_prefetch(x + i, 0, 2);
}

// PageTable of paged.py.
struct Table {
    const int32_t* chunk_of;
    int64_t chunks;
    const int32_t* entries;
    int64_t streams;
    int32_t* first_live;

    int64_t page_id(int64_t slot, int64_t stream, int64_t page) const {
        int64_t chunk = chunk_of[slot * chunks + page / TABLE_CHUNK];
        return entries[(chunk * streams + stream) * TABLE_CHUNK + page % TABLE_CHUNK];
    }
    // The oldest page that may be read, of a row whose newest one is given.
    int64_t first(int64_t slot, int64_t stream, int64_t newest) const {
        return std::min<int64_t>(first_live[slot * streams + stream], newest);
    }
};

// Batch of paged.py.
struct Batch {
    const int32_t *starts, *lengths, *slots;
    int64_t rows;
};

// Tokens of the pages that the rows of a batch hold, in the streams of a layer together.
inline int64_t held_tokens(const Table& table, const Batch& batch, int64_t layer, int64_t streams, int64_t page_size) {
    int64_t pages = 0;
    for (int64_t row = 0; row < batch.rows; row++) {
        int64_t newest = (batch.lengths[row] - 1) / page_size;
        for (int64_t nth = 0; nth < streams; nth++)
            pages += newest + 1 - table.first(batch.slots[row], layer * streams + nth, newest);
    }
    return pages * page_size;
}

// While it lives, numbers of its thread below 2**-126 are 0. The weights of what is nearly forgotten are as small, and
// with such numbers Intel's processors multiply some hundred times as slowly.
class TinyIsZero {
#ifdef __SSE2__
    static constexpr unsigned RESULTS = 1 << 15, OPERANDS = 1 << 6;
    const unsigned before = _mm_getcsr();

  public:
    TinyIsZero() { _mm_setcsr(before | RESULTS | OPERANDS); }
    ~TinyIsZero() { _mm_setcsr(before); }
    TinyIsZero(const TinyIsZero&) = delete;
#endif
};

// A part of the pages: that of page `id` begins at data + id * stride.
template <typename Number> struct Part {
    Number* data;
    int64_t stride;

    Number* of(int64_t id) const { return data + id * stride; }
};
