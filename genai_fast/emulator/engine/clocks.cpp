#include "checks.h"
#include "machine.h"

namespace {
using Shared = std::shared_ptr<const Others>;

bool covers(const Times& known, const Times& news) {
    if (known.size() < news.size()) return false;
    for (size_t k = 0; k < news.size(); k++)
        if (known[k] < news[k]) return false;
    return true;
}
bool covers(const Others& known, const Others& news) {
    for (const auto& [block, times] : news) {
        auto found = known.find(block);
        if (found == known.end() || !covers(found->second, times)) return false;
    }
    return true;
}
void join(Times& known, const Times& news) {
    if (known.size() < news.size()) known.resize(news.size());
    for (size_t k = 0; k < news.size(); k++) known[k] = std::max(known[k], news[k]);
}
// Copied only if there is news: a warp that spins sees the same clock again and again.
void join(Shared& known, const Shared& news) {
    if (!news || news == known) return;
    if (!known) { known = news; return; }
    if (covers(*known, *news)) return;
    auto both = std::make_shared<Others>(*known);
    for (const auto& [block, times] : *news) join((*both)[block], times);
    known = both;
}
Shared all_known(const Warp& w) {
    auto all = w.clock.others ? std::make_shared<Others>(*w.clock.others) : std::make_shared<Others>();
    (*all)[w.block->number] = w.clock.own;
    return all;
}
void learn(Warp& w, const Shared& news) {
    if (!news) return;
    auto mine = news->find(w.block->number);
    if (mine != news->end()) {
        u32 now = w.clock.own[w.id];
        join(w.clock.own, mine->second);
        w.clock.own[w.id] = now;
    }
    join(w.clock.others, news);
}
bool ordered(const Warp& w, const Access& before) {
    if (before.block == w.block->number) return w.clock.own[before.warp] >= before.time;
    if (!w.clock.others) return false;
    auto found = w.clock.others->find(before.block);
    return found != w.clock.others->end() && before.warp < found->second.size() &&
           found->second[before.warp] >= before.time;
}
// Whether other warps of the block did that before, and only the last barrier lies between.
bool barrier_orders(const Warp& w, const Access& before, u32 warps) {
    return before.block == w.block->number && (warps & ~(1u << w.id)) && only_barrier_orders(*w.block, before.epoch);
}
void need_barrier(Block& b) {
    if (b.barrier >= 0) b.launch->counts[b.barrier].needed++;
}
bool mine(const Warp& w, const Access& a) { return a.block == w.block->number && a.warp == w.id; }

// Triton gives a small tensor's elements to several warps; all of them load, and one stores. That one then read the
// element by the same instruction as the other, whose copy is never read.
bool replicated(const GlobalWord& word, u32 block, int load_pc, int storing_warp) {
    for (const Access& r : word.read)
        if (r.block == block && r.pc == load_pc && (r.warps >> storing_warp & 1)) return true;
    return false;
}
}  // namespace

void start_clocks(Block& b) {
    for (Warp& w : b.warps) {
        w.clock.own.assign(b.warps.size(), 0);
        w.clock.own[w.id] = 1;
    }
}

void synchronize_clocks(Block& b, u32 warps) {
    Times times(b.warps.size());
    Shared others;
    for (Warp& w : b.warps)
        if (warps >> w.id & 1) {
            join(times, w.clock.own);
            join(others, w.clock.others);
        }
    for (Warp& w : b.warps)
        if (warps >> w.id & 1) {
            w.clock.own = times;
            w.clock.own[w.id]++;
            w.clock.others = others;
        }
}

void order_atomic(Warp& w, u64 address, int order, bool reads, bool writes) {
    Shared& released = w.launch().clocks[address];
    if (order & (ACQUIRE | RELEASE) && !w.launch().one_block) w.counts().needed++;
    if (reads && released) {
        if (order & ACQUIRE) learn(w, released), w.block->acquired = !w.launch().one_block;
        else join(w.clock.seen, released);
    }
    if (!writes) return;
    if (!reads) released.reset();  // a plain store ends what earlier releases began; an atomic's update carries it on
    if (order & RELEASE) {
        if (!w.launch().one_block) need_barrier(*w.block);
        join(released, all_known(w));
        w.clock.own[w.id]++;
    } else {
        join(released, w.clock.fenced);
    }
}

void order_fence(Warp& w) {
    if (!w.launch().one_block) need_barrier(*w.block), w.block->acquired = true;
    learn(w, w.clock.seen);
    w.clock.fenced = all_known(w);
    w.clock.own[w.id]++;
}

void observe_global(Warp& w, u64 address, u32 bytes, bool writes, bool strong, bool same) {
    auto races = [&](const Access& before, u8 part) {
        return before.block && (before.bytes & part) && !mine(w, before) && !(strong && before.strong) && !ordered(w, before);
    };
    auto told = [&](Kind kind, const Access& before, u64 at) {
        report(w, kind, before.pc, int(before.block), before.warp, at);
    };
    for (u64 a = address & ~u64(3); a < address + bytes; a += 4) {
        GlobalWord& word = w.launch().shadow.word(a);
        u8 part = 15;
        if (a < address) part &= u8(15 << (address - a));
        if (a + 4 > address + bytes) part &= u8(15 >> (a + 4 - address - bytes));
        Access now{w.block->number, w.clock.own[w.id], w.block->epoch, w.pc, u8(w.id), part, u8(strong)};
        bool needed = barrier_orders(w, word.write, 1u << word.write.warp);
        if (writes) {
            if (!same && races(word.write, part)) told(Kind::GLOBAL_WRITE_AFTER_WRITE, word.write, a);
            for (Access& r : word.read) {
                needed |= barrier_orders(w, r, r.warps);
                if (!same && races(r, part) && !(r.block == now.block && (r.warps >> w.id & 1)))
                    told(Kind::GLOBAL_WRITE_AFTER_READ, r, a);
            }
            if (mine(w, word.write) && word.write.time == now.time) now.bytes |= word.write.bytes;
            word.write = now;
        } else {
            if (races(word.write, part) && !(word.write.block == now.block && replicated(word, now.block, w.pc, word.write.warp)))
                told(Kind::GLOBAL_READ_AFTER_WRITE, word.write, a);
            // Replaced is what the same instruction read, else what lies before this access, else one of the two.
            Access* r = word.read;
            auto alike = [&](const Access& x) { return !x.block || (x.block == now.block && x.pc == now.pc); };
            int which = alike(r[0]) ? 0 : alike(r[1]) ? 1 : ordered(w, r[1]) ? 1 : ordered(w, r[0]) ? 0 : int(w.launch().notes.steps & 1);
            needed |= !alike(r[which]) && barrier_orders(w, r[which], r[which].warps);  // it is forgotten
            now.warps = (alike(r[which]) ? r[which].warps : 0) | 1u << w.id;
            if (mine(w, r[which]) && r[which].time == now.time) now.bytes |= r[which].bytes;
            r[which] = now;
        }
        if (needed) need_barrier(*w.block);
    }
}
