/* What stands around vmdedup in the model: the kernel, QEMU, the guest, who kills and who plugs.
 *
 * A VM is one page of RAM. Every step of every process may come at any time after the one
 * before it: there are no clocks. So a late engine, a starved thread and a frozen process are
 * all in here. A write is waited for in the kernel while the page is protected.
 */
mtype = { OWN, STORE, BROKEN }          /* BROKEN: maps the store, and has a copy on write */

typedef Vm {
    mtype map; byte slot;               /* the page table */
    bit protected;                      /* by the userfaultfd */
    byte ram, copy;                     /* contents: of the RAM it began with; of BROKEN */
    byte last; bit discarded;           /* what was written last; the page may show anything */
    byte waits;                         /* who waits in the kernel to write, a bit each */
    byte in_flight;                     /* disk requests */
    byte disk_pin, device_pin;          /* 0: none, 1: of the page, 2: of what it was before */
    bit plugged, has_9p;                /* devices that can be seen */
    bit paused; byte noted;             /* by stop; the engine whose stop note there is */
    byte lock; byte session; bit gate;  /* who has the VM; its userfaultfd; whether it serves */
    bit socket, sent, guard;            /* the guard: can be sent; is on its way; the batch has it */
    byte lent, lender;                  /* the store's number in QEMU is: */
    bit launched, guarded, cancelled; byte target       /* the batch */
}
#define CLOSED 0                        /* nobody's, */
#define OURS 1                          /* the store, */
#define OTHER 2                         /* a file that QEMU has opened since */

Vm vm[VMS];
byte store[SLOTS + 1], size = 1, store_lock = NOBODY;   /* the last: what OTHER shows */
bit dead[ENGINES], hung[ENGINES];
bit anonymous;                          /* all RAM is; else it is in shared RAM files */

#define my vm[v]
#define SHOWN(v) (vm[v].map == OWN -> vm[v].ram : \
                 (vm[v].map == STORE -> store[vm[v].slot] : vm[v].copy))
#define RIGHT(v) (vm[v].discarded || SHOWN(v) == vm[v].last)
#define MAPS(v, s) (vm[v].map != OWN && vm[v].slot == s)
#define MAY_MAP(v, s) (vm[v].launched && vm[v].target == s && \
                      (vm[v].sent || vm[v].guard || !vm[v].guarded))
#define IS_HELD(v) (vm[v].session != NOBODY || vm[v].sent || vm[v].guard)

/* --- The kernel: page tables, userfaultfd, locks ---------------------------------------- */

inline frame_changes(v) {               /* what is pinned is not what is mapped any more */
    if :: my.disk_pin -> my.disk_pin = 2 :: else fi;
    if :: my.device_pin -> my.device_pin = 2 :: else fi
}

inline put(v) {                         /* a write to what the page is now */
    my.last = 1 - my.last; my.discarded = 0;
    if
    :: my.map == OWN -> my.ram = my.last
    :: else -> my.copy = my.last
    fi
}

inline put_by_dma(v, pin) {             /* a write to what it was when it was pinned */
    if
    :: pin == 1 -> put(v)
    :: else -> my.last = 1 - my.last; my.discarded = 0
    fi
}

inline copy_on_write(v) {
    if
    :: my.map == STORE -> my.map = BROKEN; my.copy = store[my.slot]
    :: else
    fi
}

/* To write or pin: wait while it is protected, try again when woken. */
#define WHEN_WRITABLE(v, who, may, action) \
    do \
    :: atomic { may && my.protected -> my.waits = my.waits | who }; !(my.waits & who) \
    :: atomic { may && !my.protected -> copy_on_write(v); action; break } \
    od

inline lift(v) {                        /* and wake; ENOENT where it was just remapped */
#ifdef WITHOUT_WAKE
    if :: my.protected -> my.protected = 0; my.waits = 0 :: else fi
#else
    my.protected = 0; my.waits = 0
#endif
}

inline closed(v) {                      /* a copy of the userfaultfd; was it the last? */
    if :: !IS_HELD(v) -> my.protected = 0; my.waits = 0 :: else fi
}

inline kill(e, v) {
    dead[e] = 1;
    if :: store_lock == e -> store_lock = NOBODY :: else fi;
    if :: my.lock == e -> my.lock = NOBODY :: else fi;
    if :: my.session == e -> my.session = NOBODY; my.gate = 0; my.socket = 0; closed(v) :: else fi
}

/* --- QEMU and the guest ----------------------------------------------------------------- */

#define GUEST 1
#define DISK 2
#define DEVICE 4
#define SLOW 8

proctype Guest(byte v) {
    byte n;
    do
    :: n < WRITES -> n++; WHEN_WRITABLE(v, GUEST, !my.paused, put(v))
    :: n == WRITES -> break
    od
}

proctype Disk(byte v) {                 /* one request that reads into the page by DMA */
    atomic { !my.paused -> my.in_flight++ };
    WHEN_WRITABLE(v, DISK, true, my.disk_pin = 1);
    atomic { put_by_dma(v, my.disk_pin) };
    atomic { my.disk_pin = 0; my.in_flight-- }
}

proctype Device(byte v) {               /* plugged at any time, pins for good */
    my.plugged = 1;
    WHEN_WRITABLE(v, DEVICE, true, my.device_pin = 1);
    atomic { put_by_dma(v, my.device_pin) }
}

proctype Slow9p(byte v) {               /* what began before a pause ends in it */
    !my.paused;
    WHEN_WRITABLE(v, SLOW, true, put(v))
}

proctype Balloon(byte v) {              /* discards a page that its guest does not use just now */
    if
    :: my.plugged                       /* QEMU lets it discard nothing then */
    :: atomic {
        !my.in_flight && !my.plugged && !my.waits && DISCARD_PASSES(v) ->
        my.discarded = 1;
        if
        :: !anonymous -> my.ram = HOLE          /* the protection stays */
        :: else -> my.protected = 0;            /* it goes with the page */
            if :: my.map == OWN -> my.ram = HOLE :: else fi
        fi;
        if :: my.map == BROKEN -> my.map = STORE :: else fi }
    fi
}

proctype Thread(byte v) {               /* QEMU's RCU thread; runs what was launched, some time */
end:do
    :: my.launched ->
        if
        :: atomic { my.sent -> my.sent = 0; my.guard = 1 }
        :: my.guarded && !my.sent && !my.socket -> my.cancelled = 1
        :: !my.guarded
        fi;
        if
        :: my.cancelled
        :: !my.cancelled ->                     /* the call begins, and ends */
            atomic {
                if
                :: my.lent == CLOSED            /* EBADF */
                :: else ->
                    frame_changes(v);
                    my.protected = 0;           /* a new mapping is not registered */
                    if
                    :: my.target == HOME -> my.map = OWN
                    :: else ->
                        my.map = STORE; my.slot = (my.lent == OURS -> my.target : SLOTS);
                        if :: anonymous -> my.ram = HOLE :: else fi
                    fi
                fi
            }
        fi;
        atomic { my.guard = 0; closed(v); my.launched = 0 }
    od
}

proctype Monitor(byte v) {              /* closes what a dead client has lent, and opens more */
end:do
    :: atomic {
        my.lent == OURS && my.lender != NOBODY && dead[my.lender] && MAY_CLOSE(v) ->
        my.lent = CLOSED
    }
    :: my.lent == CLOSED -> my.lent = OTHER
    od
}

proctype User(byte v) {                 /* says cont in the middle of our pause */
end:my.paused -> my.paused = 0
}

proctype Killer(byte e, v) {            /* kill -9, or SIGSTOP, at any step, or never */
    if
    :: atomic { kill(e, v) }
    :: hung[e] = 1
    :: true
    fi
}

proctype Reader() {                     /* a guest reads what was written last, at any time */
end:atomic { !(RIGHT(0) && RIGHT(VMS - 1)) -> assert(RIGHT(0) && RIGHT(VMS - 1)) }
}

init {
    byte v;
    atomic {
        store[SLOTS] = HOLE;
        if :: anonymous = 1 :: anonymous = 0 fi;
        for (v : 0 .. VMS - 1) {
            my.lock = NOBODY; my.session = NOBODY; my.noted = NOBODY;
            my.lent = OTHER; my.lender = NOBODY;
            if                          /* merged by an engine before these, or not */
            :: my.map = OWN
            :: my.map = STORE; my.ram = HOLE
            fi;
            run Thread(v)
        }
        run Guest(0); run Reader(); run Resolver();
        run Engine(0, 0);
#if ENGINES == 2
        run Engine(1, VMS - 1);
#endif
#ifdef KILLS
        run Killer(0, 0); run Guardian(0, 0);
#endif
#ifdef DISKS
        run Disk(0);
#endif
#ifdef DEVICES
        run Device(0);
#endif
#ifdef SLOW_9P
        if :: vm[0].has_9p = 1; run Slow9p(0) :: true fi;
#endif
#ifdef BALLOONS
        run Balloon(0);
#endif
#ifdef MONITORS
        run Monitor(0);
#endif
#ifdef USERS
        run User(0);
#endif
        true
    }
}
