// New tokens into the pages of their streams: token after token of every (row, stream).
#include "../pages.hpp"

// width: numbers of K of a token in a stream; r: of an interaction key. evicts is null if nothing is decided.
extern "C" void subset_write(const Pages* pages, const Table* table, const Batch* batch, int64_t layer,
                             int64_t streams, int64_t width, int64_t r, const NUMBER* k, const NUMBER* v,
                             const NUMBER* int_k, const bool* evicts, int64_t window, int64_t lag) {
#pragma omp parallel for if (batch->starts[batch->rows] * streams * width >= WORTH_THREADS)
    for (int64_t item = 0; item < batch->rows * streams; item++) {
        int64_t row = item / streams, nth = item % streams, stream = layer * streams + nth;
        int64_t slot = batch->slots[row], end = batch->starts[row + 1];
        if (slot == 0) continue;  // padding
        for (int64_t token = batch->starts[row]; token < end; token++) {
            int64_t position = batch->lengths[row] - end + token, offset = position % PAGE;
            int64_t id = table->page_id(slot, stream, position / PAGE), at = token * streams + nth;
            std::copy_n(k + at * width, width, pages->k.of(id) + offset * width);
            std::copy_n(v + at * width, width, pages->v.of(id) + offset * width);
            if (int_k) std::copy_n(int_k + at * r, r, pages->int_k.of(id) + offset * r);
            pages->begin.of(id)[offset] = int32_t(position);
            pages->end.of(id)[offset] = NEVER;
            int64_t decided = position - lag;
            if (evicts && decided >= 0) {
                id = table->page_id(slot, stream, decided / PAGE);
                pages->end.of(id)[decided % PAGE] = evicts[at] ? int32_t(decided + window + 1) : NEVER;
            }
        }
    }
}
