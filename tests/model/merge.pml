/* The merge protocol of vmdedup as a model for spin; world.pml has what stands around it.
 *
 * docs/algorithm.md, "The model", says what it covers. test_model.py has spin look at every
 * order in which the steps can come: of the whole protocol, which must be right, and of each
 * variant WITHOUT_ one safeguard, which must not.
 *
 * Right is: a guest reads what was written last (Reader); no page of the store is discarded that
 * is mapped or about to be (discard); in the end nobody waits and no VM is paused: a process
 * that is left anywhere but at its end, or at a label end..., is an error.
 */
#ifndef VMS
#define VMS 1
#endif
#ifndef ENGINES
#define ENGINES 1
#endif
#ifndef ROUNDS
#define ROUNDS 1                        /* merges and unmerges by each engine */
#endif
#ifndef WRITES
#define WRITES 1                        /* by the guest */
#endif
#ifndef PAUSES
#define PAUSES 0                        /* 1: each merge in a pause; 2: and nothing protects */
#endif
#define SLOTS 3
#define HOLE 2                          /* reads as zeroes; guests write 0 and 1 */
#define HOME 255                        /* what a batch maps instead of a slot, to unmerge */
#define NOBODY 255
#define GUARDIAN 254

#ifdef WITHOUT_PROTECTION_IN_PAUSE
#define PROTECTS 0
#else
#define PROTECTS (PAUSES != 2)
#endif
#ifdef WITHOUT_GUARD
#define GUARDED 0
#else
#define GUARDED PROTECTS
#endif
#ifdef WITHOUT_HELD_DISCARDS
#define DISCARD_PASSES(v) true
#else                                   /* it waits as a write does (EVENT_REMOVE) */
#define DISCARD_PASSES(v) (!anonymous || !IS_HELD(v) || IS_SERVED(v))
#endif
#ifdef WITHOUT_OWN_NUMBERS
#define MAY_CLOSE(v) true
#else
#define MAY_CLOSE(v) (!vm[v].launched)
#endif
#ifdef WITHOUT_GATE
#define IS_SERVED(v) (vm[v].session != NOBODY && !hung[vm[v].session])
#else
#define IS_SERVED(v) (vm[v].session != NOBODY && !hung[vm[v].session] && !vm[v].gate)
#endif

#ifdef WITHOUT_WAKE                     /* where nothing can be lifted any more */
#define NEEDS_RESOLVER(v) (IS_SERVED(v) && vm[v].waits && vm[v].protected)
#else
#define NEEDS_RESOLVER(v) (IS_SERVED(v) && vm[v].waits)
#endif

#include "world.pml"

proctype Resolver() {                   /* of whichever engine has a session: lets writers go on */
    byte v;
end:do
#ifndef WITHOUT_RESOLVER
    :: atomic { NEEDS_RESOLVER(0) -> v = 0; lift(v) }
    :: atomic { NEEDS_RESOLVER(VMS - 1) -> v = VMS - 1; lift(v) }
#endif
    :: false
    od
}

inline discard(s) {
    assert(!MAPS(0, s) && !MAPS(VMS - 1, s) && !MAY_MAP(0, s) && !MAY_MAP(VMS - 1, s));
    store[s] = HOLE
}

#ifdef WITHOUT_WHOLE_MAPPINGS           /* also where nobody shows it just now */
#define IN_USE(v, s) (MAPS(v, s) && vm[v].map == STORE)
#else
#define IN_USE MAPS
#endif

inline sweep() {                        /* the mappings of one process after the other */
    for (s : 0 .. SLOTS - 1) {
        if
        :: s < size && !IN_USE(0, s) ->
            if :: !IN_USE(VMS - 1, s) -> discard(s) :: else fi
        :: else
        fi
    }
    next = size
}

inline punch(v) {                       /* what a merged page stood on, in its RAM file */
#ifdef WITHOUT_CONFIRMATION
    if :: !anonymous -> my.ram = HOLE :: else fi
#else
    if :: !anonymous && my.map != OWN -> my.ram = HOLE :: else fi
#endif
}

inline resume(v) {
    if :: my.paused -> my.paused = 0 :: else fi;
    my.noted = NOBODY
}

inline choose() {                       /* any slot may be nominated: digests may be wrong */
#ifdef WORKERS
    next = size;
#endif
    if
    :: select(target : 0 .. next - 1)
    :: atomic {                         /* publish a copy, torn perhaps: any content */
#ifdef WORKERS
        next = size;
#endif
        next < SLOTS -> target = next; next++; size = next;
#ifdef WITHOUT_FRESH_SLOTS              /* one that nobody maps, once more */
        if
        :: target > 1 && !MAPS(0, target - 1) && !MAPS(VMS - 1, target - 1) -> target--
        :: else
        fi;
#endif
        if :: store[target] = 0 :: store[target] = 1 fi }
    fi
}

inline look(v) {                        /* asks QEMU's main thread, which may itself be waiting */
    atomic {
        !(my.waits & DISK) ->
        if :: my.plugged -> good = 0 :: else fi;
#if PAUSES == 2 && !defined(WITHOUT_REFUSAL)
        if :: my.has_9p -> good = 0 :: else fi
#endif
    }
}

inline compare(v) {                     /* or copy home what is shown now */
    if
    :: target == HOME -> copied = SHOWN(v); my.ram = copied
    :: target != HOME && store[target] == SHOWN(v)
    :: target != HOME && store[target] != SHOWN(v) ->
#ifndef WITHOUT_COMPARISON
        good = 0
#else
        skip
#endif
    fi
}

inline launch(v) {
    !my.launched;                       /* the thread is idle */
#ifdef WITHOUT_LAUNCH_BEFORE_GUARD
    my.sent = 1;
#endif
    atomic { my.launched = 1; my.guarded = GUARDED; my.cancelled = 0; my.target = target };
#if GUARDED && !defined(WITHOUT_LAUNCH_BEFORE_GUARD)
    my.sent = 1;
#endif
    if
    :: !my.launched                     /* it has ended */
    :: my.cancelled = 1;                /* past its deadline: no call is begun any more */
#ifndef WITHOUT_END_OF_BATCH
        !my.launched
#endif
    fi
}

inline remap(v) {                       /* the gate */
#if PROTECTS
    my.gate = 1;
#ifdef WITHOUT_LOOK_BEFORE_GATE
    look(v);
#endif
#ifndef WITHOUT_RECHECK
    if :: my.protected :: else -> good = 0 fi;
#endif
    if :: good -> launch(v) :: else fi;
    atomic { lift(v) };
    my.gate = 0
#else
    launch(v)
#endif
}

proctype Engine(byte me, v) {
    byte target, next, s, copied, rounds; bit good, has_store;
    {
        /* One engine works on a store, one on a VM. Who only unmerges needs no store. */
        if :: has_store = 1 :: true fi;
#if !defined(WITHOUT_STORE_LOCK) && !defined(WORKERS)
        if
        :: has_store ->
end_store:  atomic { store_lock == NOBODY -> store_lock = me }
        :: else
        fi;
#endif
#ifndef WITHOUT_VM_LOCK
end_vm: atomic { my.lock == NOBODY -> my.lock = me };
#endif
        /* What a dead engine has launched may still be to run, in whatever VM. */
#ifdef WITHOUT_WAIT_BEFORE_RESUMING
        if :: my.noted != NOBODY -> resume(v) :: else fi;
#endif
#ifndef WITHOUT_WAIT
        !my.launched;
#ifndef WITHOUT_WAIT_ELSEWHERE
        !vm[VMS - 1 - v].launched;
#endif
#endif
        if :: my.noted != NOBODY -> resume(v) :: else fi;
#ifndef WORKERS
        if :: has_store -> sweep() :: else fi;
#endif
        if :: my.map != OWN -> punch(v) :: else fi;
        atomic { my.lent = OURS; my.lender = me };

        do
        :: rounds < ROUNDS ->
            rounds++; good = 1;
            if
            :: my.map != OWN -> target = HOME
            :: my.map != STORE && has_store -> choose()
            :: true -> break
            fi;
#if PAUSES
#ifndef WITHOUT_NOTE_FIRST
            my.noted = me;
#endif
            atomic { !my.in_flight && !(my.waits & GUEST) -> my.paused = 1 };
#ifdef WITHOUT_NOTE_FIRST
            my.noted = me;
#endif
#endif
#ifdef WITHOUT_COMPARISON_UNDER_PROTECTION
            compare(v);
#endif
#ifdef WITHOUT_LOOK_AFTER_ARMING
            look(v);
#endif
#if PROTECTS
            /* Arm. */
            atomic { !IS_HELD(v) -> my.session = me; my.socket = 1; my.protected = 1 };
#endif
#ifndef WITHOUT_DRAIN
            !my.in_flight;
#endif
#if !defined(WITHOUT_LOOK_AFTER_ARMING) && !defined(WITHOUT_LOOK_BEFORE_GATE)
            look(v);
#endif
#ifndef WITHOUT_COMPARISON_UNDER_PROTECTION
            compare(v);
#endif
            if :: good -> remap(v) :: else fi;
#if !PAUSES
            if :: true :: true -> end_session: false fi;        /* it may last */
#endif
#if PROTECTS
            atomic { my.session = NOBODY; my.socket = 0; closed(v) };
#endif
#if PAUSES
            resume(v);
#endif
            if :: good && target != HOME -> punch(v) :: else fi
        :: else -> break
        od;
        atomic {
            if :: my.lock == me -> my.lock = NOBODY :: else fi;
            if :: store_lock == me -> store_lock = NOBODY :: else fi
        }
    } unless {
        dead[me] || hung[me];
end_hung:
        dead[me]
    }
}

proctype Guardian(byte e, v) {          /* of one engine */
end:do
#ifndef WITHOUT_HANG_LIMIT
    :: atomic { hung[e] && !dead[e] && (my.session == e || my.noted == e) -> kill(e, v) }
#endif
#ifndef WITHOUT_GUARDIAN
    :: dead[e] && my.noted == e ->
#ifndef WITHOUT_GUARDIAN_LOCK
end_vm: atomic { my.lock == NOBODY -> my.lock = GUARDIAN };
#endif
#ifndef WITHOUT_WAIT_TO_RESUME
        !my.launched;
#endif
        if :: my.noted == e -> resume(v) :: else fi;
        if :: my.lock == GUARDIAN -> my.lock = NOBODY :: else fi
#endif
    :: false
    od
}
