// Live tokens of the oldest pages into the places of dropped ones: token after token of every (row, stream).
#include "../pages.hpp"

// fields: [count, 2] where the first token of a page has something, in bytes from the page's beginning, and its bytes.
extern "C" void compact(const Pages* pages, const Table* table, const Batch* batch, uint8_t* pool, int64_t page_bytes,
                        const int64_t* fields, int64_t num_fields, int64_t period, int64_t unsettled) {
    const int64_t work = held_tokens(*table, *batch, 0, table->streams, PAGE) * 2;
#pragma omp parallel for schedule(dynamic, 1) if (work >= WORTH_THREADS)
    for (int64_t item = 0; item < batch->rows * table->streams; item++) {
        int64_t row = item / table->streams, stream = item % table->streams, slot = batch->slots[row];
        int64_t length = std::max<int64_t>(batch->lengths[row] - unsettled, 0);
        int64_t before = std::max<int64_t>(length - (batch->starts[row + 1] - batch->starts[row]), 0);
        if (slot == 0 || length / period == before / period) continue;
        int64_t newest = (length - 1) / PAGE, first = table->first(slot, stream, newest), held = newest + 1 - first;
        std::vector<int64_t> ids, moving(held, 0), room(held, 0);
        std::vector<uint8_t> live(held * PAGE, 0);
        int64_t places = 0, to_move = 0, emptied = 0;
        for (int64_t nth = 0; nth < held; nth++) {
            ids.push_back(table->page_id(slot, stream, first + nth));
            int64_t written = std::min<int64_t>(PAGE, length - (first + nth) * PAGE);
            for (int64_t n = 0; n < written; n++)
                moving[nth] += live[nth * PAGE + n] = pages->end.of(ids[nth])[n] > length;
            places += room[nth] = written - moving[nth];
        }
        // Pages are emptied from the oldest one on, while newer pages have places for all their live tokens.
        while (emptied < held - 1 && to_move + moving[emptied] <= places - room[emptied]) {
            to_move += moving[emptied], places -= room[emptied];
            emptied++;
        }
        int64_t target = emptied * PAGE;  // the places go from the oldest page to the newest
        for (int64_t source = 0; source < emptied * PAGE; source++) {
            if (!live[source]) continue;
            while (live[target]) target++;
            for (int64_t field = 0; field < num_fields; field++) {
                int64_t at = fields[2 * field], size = fields[2 * field + 1];
                const uint8_t* from = pool + ids[source / PAGE] * page_bytes + at + source % PAGE * size;
                std::copy_n(from, size, pool + ids[target / PAGE] * page_bytes + at + target % PAGE * size);
            }
            target++;
        }
        // The request may have had more settled tokens before, and its first live page stand behind those of now.
        int32_t& known = table->first_live[slot * table->streams + stream];
        if (emptied) known = std::max(known, int32_t(first + emptied));
    }
}
