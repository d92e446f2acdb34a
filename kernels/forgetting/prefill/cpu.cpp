// Prefill over pages: a block of queries of a head walks from its newest page back to the first that is not negligible.
#include "../pages.hpp"

// tiles: [count, 2] (index into rows, block of queries); threshold: [heads, groups].
extern "C" void prefill_attention(const Pages* pages, const Table* table, const Batch* batch, const int32_t* rows,
                                  const int32_t* tiles, int64_t num_tiles, int64_t layer, int64_t heads,
                                  int64_t groups, const float* threshold, const NUMBER* q, float scale, NUMBER* out) {
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t item = 0; item < num_tiles * heads; item++) {
        TinyIsZero tiny;
        int64_t tile = item / heads, head = item % heads, row = rows[tiles[2 * tile]], stream = layer * heads + head;
        int64_t slot = batch->slots[row], length = batch->lengths[row], end = batch->starts[row + 1];
        int64_t start = batch->starts[row] + tiles[2 * tile + 1] * QUERY_BLOCK;
        int64_t count = std::min(end - start, QUERY_BLOCK);
        int64_t first = length - end + start;  // position of the first query
        int64_t newest = (first + count - 1) / PAGE, begins = first / PAGE;
        int64_t oldest = table->first(slot, stream, begins);
        std::vector<int64_t> ids;
        for (int64_t page = oldest; page <= newest; page++) ids.push_back(table->page_id(slot, stream, page));

        // The first query, the least decayed, tells where the walk ends.
        std::vector<double> decay;
        for (int64_t g = 0; g < groups; g++)
            decay.push_back(pages->gates.of(ids[begins - oldest])[g * PAGE + first % PAGE]);
        for (bool live = true; begins > oldest; begins--) {
            live = false;
            for (int64_t g = 0; g < groups; g++) live |= decay[g] >= threshold[head * groups + g];
            if (!live) break;
            for (int64_t g = 0; g < groups; g++)
                decay[g] += pages->gates.of(ids[begins - 1 - oldest])[g * PAGE + PAGE - 1];
        }

        std::vector<float> query(QUERY_BLOCK * D), value(QUERY_BLOCK * D), keys(D * PAGE), values(PAGE * D);
        float peak[QUERY_BLOCK], mass[QUERY_BLOCK], weights[TOGETHER * PAGE], after[PAGE];
        float own[QUERY_BLOCK];   // the sum of log f from the beginning of its page to the query
        double far[QUERY_BLOCK];  // and over the pages between it and the one at hand
        for (int64_t g = 0; g < groups; g++) {
            auto at = [&](int64_t i) { return (((start + i) * heads + head) * groups + g) * D; };
            for (int64_t i = 0; i < count; i++) {
                int64_t position = first + i;
                own[i] = pages->gates.of(ids[position / PAGE - oldest])[g * PAGE + position % PAGE];
                far[i] = own[i], peak[i] = -std::numeric_limits<float>::infinity(), mass[i] = 0;
                for (int d = 0; d < D; d++) query[i * D + d] = wide(q[at(i) + d]) * scale, value[i * D + d] = 0;
            }
            for (int64_t page = newest; page >= begins; page--) {
                int64_t id = ids[page - oldest], written = std::min<int64_t>(PAGE, length - page * PAGE);
                const NUMBER *k = pages->k.of(id), *v = pages->v.of(id);
                const float* sums = pages->gates.of(id) + g * PAGE;
                for (int64_t n = 0; n < PAGE; n++) {
                    bool there = n < written;
                    for (int d = 0; d < D; d++) {
                        keys[d * PAGE + n] = there ? wide(k[n * D + d]) : 0;
                        values[n * D + d] = there ? wide(v[n * D + d]) : 0;
                    }
                    after[n] = there ? sums[written - 1] - sums[n] : 0;
                }
                int64_t some = std::max<int64_t>(0, page * PAGE - first) / TOGETHER * TOGETHER;
                for (; some < count; some += TOGETHER) {
                    std::fill_n(weights, TOGETHER * PAGE, 0.0f);
                    add_product<TOGETHER, D, PAGE>(weights, &query[some * D], keys.data());
                    for (int64_t i = some; i < some + TOGETHER; i++) {
                        float* mine = weights + (i - some) * PAGE;
                        int64_t seen = i < count ? std::min<int64_t>(PAGE, first + i + 1 - page * PAGE) : 0;
                        if (seen <= 0) {
                            std::fill_n(mine, PAGE, 0.0f);
                            continue;
                        }
                        if (first + i < (page + 1) * PAGE) {  // the query's own page
                            for (int64_t n = 0; n < seen; n++) mine[n] += own[i] - sums[n];
                        } else {
                            const float bias = float(far[i]);
                            for (int64_t n = 0; n < PAGE; n++) mine[n] += after[n] + bias;
                            far[i] += sums[PAGE - 1];
                        }
                        float top = std::max(peak[i], largest(mine, seen)), sum = 0;
#pragma omp simd reduction(+ : sum)
                        for (int64_t n = 0; n < PAGE; n++) {
                            mine[n] = n < seen ? exponential(mine[n] - top) : 0;
                            sum += mine[n];
                        }
                        float shrink = exponential(peak[i] - top);
                        peak[i] = top, mass[i] = mass[i] * shrink + sum;
                        for (int d = 0; d < D; d++) value[i * D + d] *= shrink;
                    }
                    add_product<TOGETHER, PAGE, D>(&value[some * D], weights, values.data());
                }
            }
            for (int64_t i = 0; i < count; i++)
                for (int d = 0; d < D; d++) out[at(i) + d] = narrow<NUMBER>(value[i * D + d] / mass[i]);
        }
    }
}
