// Decode over live pages: one pass over the pages of every (row, head), from the newest one back.
#include "../pages.hpp"

extern "C" void decode_attention(const Pages* pages, const Table* table, const Batch* batch, int64_t layer,
                                 int64_t heads, int64_t groups, const NUMBER* q, float scale, NUMBER* out) {
    const int64_t work = held_tokens(*table, *batch, layer, heads, PAGE) * groups * D * 2;
#pragma omp parallel for schedule(dynamic, 1) if (work >= WORTH_THREADS)
    for (int64_t item = 0; item < batch->rows * heads; item++) {
        TinyIsZero tiny;
        int64_t row = item / heads, head = item % heads, stream = layer * heads + head, token = batch->starts[row];
        if (batch->starts[row + 1] - token != 1) continue;
        int64_t slot = batch->slots[row], length = batch->lengths[row], newest = (length - 1) / PAGE;
        std::vector<float> query(groups * D), value(groups * D, 0.0f), mass(groups, 0.0f);
        std::vector<float> peak(groups, -std::numeric_limits<float>::infinity());
        std::vector<double> decay(groups, 0.0);  // over the newer pages
        const int64_t first_number = (token * heads + head) * groups * D;
        for (int64_t i = 0; i < groups * D; i++) query[i] = wide(q[first_number + i]) * scale;
        const int64_t first = table->first(slot, stream, newest);
        for (int64_t page = newest; page >= first; page--) {
            int64_t id = table->page_id(slot, stream, page);
            const NUMBER *k = pages->k.of(id), *v = pages->v.of(id);
            const int64_t next = page > first ? table->page_id(slot, stream, page - 1) : id;
            int64_t count = page == newest ? (length - 1) % PAGE + 1 : PAGE;
            for (int64_t g = 0; g < groups; g++) {
                const float* sums = pages->gates.of(id) + g * PAGE;
                const float total = sums[count - 1], after = float(decay[g]);
                float* mine = value.data() + g * D;
                float weights[PAGE];
                for (int64_t n = 0; n < count; n++) {
                    fetch(pages->k.of(next), n * D, (n + 1) * D), fetch(pages->v.of(next), n * D, (n + 1) * D);
                    weights[n] = dot<D>(&query[g * D], k + n * D);
                }
#pragma omp simd
                for (int64_t n = 0; n < count; n++) weights[n] += (total - sums[n]) + after;
                float top = std::max(peak[g], largest(weights, count)), shrink = exponential(peak[g] - top), sum = 0;
                peak[g] = top;
#pragma omp simd reduction(+ : sum)
                for (int64_t n = 0; n < count; n++) {
                    weights[n] = exponential(weights[n] - top);
                    sum += weights[n];
                }
                mass[g] = mass[g] * shrink + sum;
                for (int i = 0; i < D; i++) mine[i] *= shrink;
                add_rows<D>(mine, weights, count, [&](int64_t n) { return v + n * D; });
                decay[g] += total;
            }
        }
        for (int64_t i = 0; i < groups * D; i++) out[first_number + i] = narrow<NUMBER>(value[i] / mass[i / D]);
    }
}
