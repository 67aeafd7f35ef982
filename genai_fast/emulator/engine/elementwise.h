// Instructions that treat each lane by itself: templates over the types of their operands and a function.
#pragma once
#include "machine.h"

template <class D, class A, auto F> void unary(Warp& w, const Instruction& i, u32 m) {
    D* d = w.at<D>(i.o[0]);
    const A* a = w.at<A>(i.o[1]);
    each(m, [=](int l) { d[l] = F(a[l]); });
}
template <class D, class A, class B, auto F> void binary(Warp& w, const Instruction& i, u32 m) {
    D* d = w.at<D>(i.o[0]);
    const A* a = w.at<A>(i.o[1]);
    const B* b = w.at<B>(i.o[2]);
    each(m, [=](int l) { d[l] = F(a[l], b[l]); });
}
template <class D, class A, class B, class C, auto F> void ternary(Warp& w, const Instruction& i, u32 m) {
    D* d = w.at<D>(i.o[0]);
    const A* a = w.at<A>(i.o[1]);
    const B* b = w.at<B>(i.o[2]);
    const C* c = w.at<C>(i.o[3]);
    each(m, [=](int l) { d[l] = F(a[l], b[l], c[l]); });
}

// Halves are computed in float32 and rounded once; x2 does it for two of them.
template <class T, auto F> constexpr auto lift1 = [](T a) { return narrow<T>(F(wide(a))); };
template <class T, auto F> constexpr auto lift2 = [](T a, T b) { return narrow<T>(F(wide(a), wide(b))); };
template <class T, auto F> constexpr auto lift3 = [](T a, T b, T c) { return narrow<T>(F(wide(a), wide(b), wide(c))); };
template <class T, auto F> constexpr auto pair1 = [](Pair<T> a) { return Pair<T>{F(a.low), F(a.high)}; };
template <class T, auto F>
constexpr auto pair2 = [](Pair<T> a, Pair<T> b) { return Pair<T>{F(a.low, b.low), F(a.high, b.high)}; };
template <class T, auto F>
constexpr auto pair3 = [](Pair<T> a, Pair<T> b, Pair<T> c) {
    return Pair<T>{F(a.low, b.low, c.low), F(a.high, b.high, c.high)};
};

// A NaN loses to a number, and -0 is less than +0; the `nan` forms give NaN.
constexpr auto Max = [](auto a, auto b) {
    return a != a ? b : b != b ? a : a > b || (a == b && !std::signbit(a)) ? a : b;
};
constexpr auto Min = [](auto a, auto b) {
    return a != a ? b : b != b ? a : a < b || (a == b && std::signbit(a)) ? a : b;
};
constexpr auto MaxNan = [](auto a, auto b) { return a != a ? a : b != b ? b : Max(a, b); };
constexpr auto MinNan = [](auto a, auto b) { return a != a ? a : b != b ? b : Min(a, b); };
template <class T> constexpr T max_int(T a, T b) { return a > b ? a : b; }
template <class T> constexpr T min_int(T a, T b) { return a < b ? a : b; }

// setp. mod[0]: combined by 0 nothing, 1 and, 2 or, 3 xor; mod[1]: with o[3] negated. o[4]: the opposite, or -1.
template <class T, auto F> void setp(Warp& w, const Instruction& i, u32 m) {
    u32* d = w.at<u32>(i.o[0]);
    const T *a = w.at<T>(i.o[1]), *b = w.at<T>(i.o[2]);
    if (!i.mod[0] && i.o[4] < 0) return each(m, [=](int l) { d[l] = F(a[l], b[l]) ? ALL : 0; });
    const u32* c = i.mod[0] ? w.at<u32>(i.o[3]) : nullptr;
    u32 flip = i.mod[1] ? ALL : 0;
    auto combined = [&](u32 x, int l) {
        switch (i.mod[0]) {
            case 1: return x & (c[l] ^ flip);
            case 2: return x | (c[l] ^ flip);
            case 3: return x ^ c[l] ^ flip;
            default: return x;
        }
    };
    each(m, [&](int l) {
        u32 x = F(a[l], b[l]) ? ALL : 0;
        u32 yes = combined(x, l), no = combined(~x, l);
        d[l] = yes;
        if (i.o[4] >= 0) w.at<u32>(i.o[4])[l] = no;
    });
}
// Of pairs: o[0] for the low halves, o[4] for the high ones.
template <class T, auto F> void setp_pair(Warp& w, const Instruction& i, u32 m) {
    const Pair<T> *a = w.at<Pair<T>>(i.o[1]), *b = w.at<Pair<T>>(i.o[2]);
    if (i.mod[0]) fault(-1, "setp of pairs, combined with a predicate, is not implemented");
    each(m, [&](int l) {
        bool low = F(a[l].low, b[l].low), high = F(a[l].high, b[l].high);
        if (i.o[0] >= 0) w.at<u32>(i.o[0])[l] = low ? ALL : 0;
        if (i.o[4] >= 0) w.at<u32>(i.o[4])[l] = high ? ALL : 0;
    });
}
