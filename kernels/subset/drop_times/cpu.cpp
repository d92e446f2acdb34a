// Which query drops which token: page by page of every (row, stream). R is the size of an interaction key.
#include "../pages.hpp"

// below: [rows, streams, longest] or null.
extern "C" void drop_times(const Pages* pages, const Table* table, const Batch* batch, int64_t layer, int64_t streams,
                           const NUMBER* int_q, const float* bias, int32_t* below, int64_t longest) {
    int64_t most = 0;  // pages of a row in a stream
    for (int64_t row = 0; row < batch->rows; row++) {
        int64_t newest = (batch->lengths[row] - 1) / PAGE;
        for (int64_t nth = 0; nth < streams; nth++)
            most = std::max(most, newest + 1 - table->first(batch->slots[row], layer * streams + nth, newest));
    }
    const float scale = 1.0f / std::sqrt(float(R));
    const int64_t queries = batch->starts[batch->rows] / std::max<int64_t>(batch->rows, 1);
    const int64_t work = held_tokens(*table, *batch, layer, streams, PAGE) * queries * R;
#pragma omp parallel for if (work >= WORTH_THREADS)
    for (int64_t item = 0; item < batch->rows * streams * most; item++) {
        int64_t row = item / (streams * most), nth = item / most % streams, stream = layer * streams + nth;
        int64_t slot = batch->slots[row], length = batch->lengths[row], start = batch->starts[row];
        int64_t first = length - (batch->starts[row + 1] - start);  // position of the first query
        int64_t newest = (length - 1) / PAGE, page = newest - item % most;
        if (slot == 0 || first == length || page < table->first(slot, stream, newest)) continue;
        int64_t id = table->page_id(slot, stream, page), written = std::min<int64_t>(PAGE, length - page * PAGE);
        const NUMBER* keys = pages->int_k.of(id);
        const int32_t* begin = pages->begin.of(id);
        int32_t* end = pages->end.of(id);
        bool live[PAGE];
        for (int64_t n = 0; n < written; n++) live[n] = end[n] > first;
        float columns[R * PAGE], query[R], scores[PAGE];
        const bool several = length - first > 1;
        if (several) {
            std::fill_n(columns, R * PAGE, 0.0f);
            for (int64_t n = 0; n < written; n++)
                for (int i = 0; i < R; i++) columns[i * PAGE + n] = wide(keys[n * R + i]);
        }
        for (int64_t position = first; position < length; position++) {
            const NUMBER* given = int_q + ((start + position - first) * streams + nth) * R;
            for (int i = 0; i < R; i++) query[i] = wide(given[i]) * scale;
            if (several) {
                std::fill_n(scores, PAGE, 0.0f);
                add_product<1, R, PAGE>(scores, query, columns);
            } else {
                for (int64_t n = 0; n < written; n++) scores[n] = dot<R>(query, keys + n * R);
            }
            for (int64_t n = 0; n < written; n++)
                if (scores[n] + bias[nth] <= 0 && begin[n] < position && position < end[n]) end[n] = int32_t(position);
        }
        if (!below) continue;
        int32_t* found = below + (row * streams + nth) * longest;
        for (int64_t n = 0; n < written; n++) {
            if (!live[n]) continue;
            if (layer) end[n] = std::min(end[n], found[begin[n]]);
            found[begin[n]] = end[n];
        }
    }
}
