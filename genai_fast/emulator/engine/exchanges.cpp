// What the lanes of a warp tell each other: shfl, redux, vote, elect.
#include "elementwise.h"

namespace {
void all_came(const char* name, u32 members, u32 m, int lane) {
    if (members & ~m) fault(lane, "%s: members %08x, but only the lanes %08x came", name, members, m);
}

template <int MODE> void shfl(Warp& w, const Instruction& i, u32 m) {  // o: d, p or -1, a, b, c, members
    u32 *d = w.at<u32>(i.o[0]), *b = w.at<u32>(i.o[3]), *c = w.at<u32>(i.o[4]), *members = w.at<u32>(i.o[5]);
    u32 a[32];
    memcpy(a, w.file + i.o[2], sizeof a);
    each(m, [&](int l) {
        all_came("shfl.sync", members[l], m, l);
        int segment = c[l] >> 8 & 31, clamp = c[l] & 31, least = l & segment, most = least | (clamp & ~segment), j;
        int by = b[l] & 31;
        bool valid;
        if constexpr (MODE == 0) j = l ^ by, valid = j <= most;                 // bfly
        if constexpr (MODE == 1) j = least | (by & ~segment), valid = j <= most;  // idx
        if constexpr (MODE == 2) j = l - by, valid = j >= most;                 // up
        if constexpr (MODE == 3) j = l + by, valid = j <= most;                 // down
        if (!valid) j = l;
        if (!(m >> j & 1)) fault(l, "shfl.sync reads lane %d, which is not active", j);
        d[l] = a[j];
        if (i.o[1] >= 0) w.at<u32>(i.o[1])[l] = valid ? ALL : 0;
    });
}
template <class T, auto F> void redux(Warp& w, const Instruction& i, u32 m) {
    T *d = w.at<T>(i.o[0]), *a = w.at<T>(i.o[1]);
    u32* members = w.at<u32>(i.o[2]);
    bool first = true;
    T total{};
    each(m, [&](int l) {
        all_came("redux.sync", members[l], m, l);
        total = first ? a[l] : F(total, a[l]);
        first = false;
    });
    each(m, [&](int l) { d[l] = total; });
}
template <int MODE> void vote(Warp& w, const Instruction& i, u32 m) {  // 0 ballot, 1 any, 2 all; mod[0]: negated
    u32 *d = w.at<u32>(i.o[0]), votes = (mask_of(w.at<u32>(i.o[1])) ^ (i.mod[0] ? ALL : 0)) & m;
    each(m, [&](int l) { d[l] = MODE == 0 ? votes : (MODE == 1 ? votes != 0 : votes == m) ? ALL : 0; });
}
void elect(Warp& w, const Instruction& i, u32 m) {
    int leader = std::countr_zero(m);
    each(m, [&](int l) {
        if (i.o[0] >= 0) w.at<u32>(i.o[0])[l] = leader;
        w.at<u32>(i.o[1])[l] = l == leader ? ALL : 0;
    });
}
}  // namespace

void add_exchanges(Table& R) {
    R["shfl.bfly"] = shfl<0>; R["shfl.idx"] = shfl<1>; R["shfl.up"] = shfl<2>; R["shfl.down"] = shfl<3>;
    R["redux.add.s32"] = R["redux.add.u32"] = redux<u32, [](u32 a, u32 b) { return a + b; }>;
    R["redux.max.s32"] = redux<s32, max_int<s32>>; R["redux.min.s32"] = redux<s32, min_int<s32>>;
    R["redux.max.u32"] = redux<u32, max_int<u32>>; R["redux.min.u32"] = redux<u32, min_int<u32>>;
    R["redux.and.b32"] = redux<u32, [](u32 a, u32 b) { return a & b; }>;
    R["redux.or.b32"] = redux<u32, [](u32 a, u32 b) { return a | b; }>;
    R["redux.xor.b32"] = redux<u32, [](u32 a, u32 b) { return a ^ b; }>;
    R["vote.ballot"] = vote<0>; R["vote.any"] = vote<1>; R["vote.all"] = vote<2>; R["elect"] = elect;
}
