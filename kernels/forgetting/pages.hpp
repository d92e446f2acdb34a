// ForgettingPages of pages.py, of heads of size D and PAGE tokens a page.
#include "../common.hpp"

struct Pages {
    Part<NUMBER> k, v;
    Part<float> gates;
    Part<NUMBER> last;
    int64_t kept;  // tokens of which a page keeps raw k and v; 0 without token shift
};
