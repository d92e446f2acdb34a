// SubsetPages of pages.py, of PAGE tokens a page.
#include "../common.hpp"

constexpr int32_t NEVER = std::numeric_limits<int32_t>::max();

struct Pages {
    Part<NUMBER> k, v, int_k;
    Part<int32_t> begin, end;
};
