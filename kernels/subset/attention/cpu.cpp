// Attention over the tokens that a stream has not dropped, for heads of size D.
#include "../pages.hpp"

constexpr int TILE = 64;  // a block of queries multiplies so many keys at once
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

// Rows with one query: heads go through the pages of their stream together, as a page has the heads of a token side by
// side. There are as many parts of the heads as it takes to give all threads something.
extern "C" void decode_attention(const Pages* pages, const Table* table, const Batch* batch, int64_t layer,
                                 int64_t streams, int64_t heads, int64_t groups, const NUMBER* q, float scale,
                                 NUMBER* out) {
    const int64_t work = held_tokens(*table, *batch, layer, streams, PAGE) * heads * groups * D * 2;
    const int64_t threads = omp_get_max_threads(), others = std::max<int64_t>(batch->rows * streams, 1);
    const int64_t parts = std::min(heads, (threads + others - 1) / others);
#pragma omp parallel for schedule(dynamic, 1) if (work >= WORTH_THREADS)
    for (int64_t item = 0; item < batch->rows * streams * parts; item++) {
        TinyIsZero tiny;
        int64_t row = item / (streams * parts), nth = item / parts % streams, part = item % parts;
        int64_t stream = layer * streams + nth, slot = batch->slots[row], length = batch->lengths[row];
        int64_t token = batch->starts[row], newest = (length - 1) / PAGE;
        if (batch->starts[row + 1] - token != 1) continue;
        const int64_t first_head = part * heads / parts, queries = ((part + 1) * heads / parts - first_head) * groups;
        std::vector<float> query(queries * D), value(queries * D, 0.0f), mass(queries, 0.0f), peak(queries, NOTHING);
        const int64_t first_number = ((token * streams + nth) * heads + first_head) * groups * D;
        for (int64_t i = 0; i < queries * D; i++) query[i] = wide(q[first_number + i]) * scale;
        for (int64_t page = table->first(slot, stream, newest); page <= newest; page++) {
            int64_t id = table->page_id(slot, stream, page), written = std::min<int64_t>(PAGE, length - page * PAGE);
            const int64_t next = page < newest ? table->page_id(slot, stream, page + 1) : id;
            const int64_t numbers = PAGE * heads * D;  // of K of a page
            fetch(pages->end.of(next), 0, PAGE);
            int64_t seen[PAGE], count = 0;  // where the numbers of the tokens are
            for (int64_t n = 0; n < written; n++)
                if (pages->end.of(id)[n] >= length) seen[count++] = (n * heads + first_head) * D;
            for (int64_t g = 0; g < queries && count; g++) {
                float weights[PAGE], sum = 0, *mine = value.data() + g * D;
                const NUMBER *k = pages->k.of(id) + g / groups * D, *v = pages->v.of(id) + g / groups * D;
                fetch(pages->k.of(next), numbers * g / queries, numbers * (g + 1) / queries);
                for (int64_t c = 0; c < count; c++) weights[c] = dot<D>(&query[g * D], k + seen[c]);
                fetch(pages->v.of(next), numbers * g / queries, numbers * (g + 1) / queries);
                float top = std::max(peak[g], largest(weights, count)), shrink = exponential(peak[g] - top);
                peak[g] = top;
#pragma omp simd reduction(+ : sum)
                for (int64_t c = 0; c < count; c++) {
                    weights[c] = exponential(weights[c] - top);
                    sum += weights[c];
                }
                mass[g] = mass[g] * shrink + sum;
                for (int i = 0; i < D; i++) mine[i] *= shrink;
                add_rows<D>(mine, weights, count, [&](int64_t c) { return v + seen[c]; });
            }
        }
        for (int64_t i = 0; i < queries * D; i++) out[first_number + i] = narrow<NUMBER>(value[i] / mass[i / D]);
    }
}

// Rows with several queries: a block of queries of a head goes through what at least one of them sees.
// tiles: [count, 2] (index into rows, block of queries).
extern "C" void prefill_attention(const Pages* pages, const Table* table, const Batch* batch, const int32_t* rows,
                                  const int32_t* tiles, int64_t num_tiles, int64_t layer, int64_t streams,
                                  int64_t heads, int64_t groups, const NUMBER* q, float scale, NUMBER* out) {
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t item = 0; item < num_tiles * streams * heads; item++) {
        TinyIsZero tiny;
        int64_t tile = item / (streams * heads), nth = item / heads % streams, head = item % heads;
        int64_t row = rows[tiles[2 * tile]], stream = layer * streams + nth, slot = batch->slots[row];
        int64_t length = batch->lengths[row], newest = (length - 1) / PAGE, behind = batch->starts[row + 1];
        int64_t start = batch->starts[row] + tiles[2 * tile + 1] * QUERY_BLOCK;
        int64_t count = std::min(behind - start, QUERY_BLOCK);
        int64_t first = length - behind + start;  // position of the first query

        std::vector<const NUMBER*> k, v;
        std::vector<int32_t> begin, end;
        for (int64_t page = table->first(slot, stream, newest); page <= newest; page++) {
            int64_t id = table->page_id(slot, stream, page), written = std::min<int64_t>(PAGE, length - page * PAGE);
            for (int64_t n = 0; n < written; n++) {
                int32_t from = pages->begin.of(id)[n], to = pages->end.of(id)[n];
                if (from >= first + count || to <= first) continue;
                begin.push_back(from), end.push_back(to);
                k.push_back(pages->k.of(id) + (n * heads + head) * D);
                v.push_back(pages->v.of(id) + (n * heads + head) * D);
            }
        }
        const int64_t total = int64_t(k.size());

        std::vector<float> query(QUERY_BLOCK * D), value(QUERY_BLOCK * D), keys(D * TILE);
        std::vector<float> values(TILE * D);
        float peak[QUERY_BLOCK] = {0}, mass[QUERY_BLOCK], weights[TOGETHER * TILE];
        for (int64_t g = 0; g < groups; g++) {
            auto at = [&](int64_t i) { return ((((start + i) * streams + nth) * heads + head) * groups + g) * D; };
            for (int64_t i = 0; i < count; i++) {
                peak[i] = NOTHING, mass[i] = 0;
                for (int d = 0; d < D; d++) query[i * D + d] = wide(q[at(i) + d]) * scale, value[i * D + d] = 0;
            }
            for (int64_t some = 0; some < total; some += TILE) {
                const int64_t here = std::min<int64_t>(TILE, total - some);
                for (int64_t n = 0; n < TILE; n++) {
                    for (int d = 0; d < D; d++) {
                        keys[d * TILE + n] = n < here ? wide(k[some + n][d]) : 0;
                        values[n * D + d] = n < here ? wide(v[some + n][d]) : 0;
                    }
                }
                int32_t from[TILE] = {0}, to[TILE] = {0};
                std::copy_n(begin.data() + some, here, from), std::copy_n(end.data() + some, here, to);
                for (int64_t block = 0; block < count; block += TOGETHER) {
                    std::fill_n(weights, TOGETHER * TILE, 0.0f);
                    add_product<TOGETHER, D, TILE>(weights, &query[block * D], keys.data());
                    for (int64_t i = block; i < block + TOGETHER; i++) {
                        float* mine = weights + (i - block) * TILE;
                        const int32_t position = int32_t(first + i);
                        int sees = 0;
                        for (int64_t n = 0; n < TILE; n++) {
                            const int one = (from[n] <= position) & (position < to[n]);
                            sees += one, mine[n] = one ? mine[n] : NOTHING;
                        }
                        float top = std::max(peak[i], largest(mine, TILE)), sum = 0;
                        if (i >= count || !sees) {
                            std::fill_n(mine, TILE, 0.0f);
                            continue;
                        }
#pragma omp simd reduction(+ : sum)
                        for (int64_t n = 0; n < TILE; n++) {
                            mine[n] = mine[n] != NOTHING ? exponential(mine[n] - top) : 0;
                            sum += mine[n];
                        }
                        float shrink = exponential(peak[i] - top);
                        peak[i] = top, mass[i] = mass[i] * shrink + sum;
                        for (int d = 0; d < D; d++) value[i * D + d] *= shrink;
                    }
                    add_product<TOGETHER, TILE, D>(&value[block * D], weights, values.data());
                }
            }
            for (int64_t i = 0; i < count; i++)
                for (int d = 0; d < D; d++) out[at(i) + d] = narrow<NUMBER>(value[i * D + d] / mass[i]);
        }
    }
}
