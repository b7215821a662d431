/*
 * Who may speak: the protocol of ftd/authority.py, for the model checker spin.
 *
 * Two nodes and an arbiter. P runs the guest when all begins, B has nothing. Everything that takes time or can
 * get lost is asynchronous: frames and acknowledgements under way, questions to the arbiter, its answers. Each
 * side may take the other for lost at any moment, rightly or not: safety must need no clock.
 *
 * The guest's output is modelled by one number: `released`, the newest epoch of which the world has seen
 * something. A takeover from an epoch before that one would be seen by clients as a step back in time.
 *
 * Checked:
 *   assertions     at most one side releases output of its own authority; P releases under B's authority only
 *                  what B's guest has in its past; a takeover starts from an acknowledged frame, which nothing
 *                  that was released is newer than
 *   ltl speaks     output flows in the end, as long as the arbiter and one host live
 *   end states     nobody is stuck
 *
 * Mutants, each a rule left out, which have to be refuted: NO_CAS, RELEASE_EARLY, TAKE_UNACKED, NO_PAIRING,
 * NO_DOUBT, NO_QUIET (a daemon is replaced with frames under way), NO_HOLD (its successor does not ask). Names are those of ftd/authority.py.
 */

/* The size of the search; the test asks for a smaller one where it looks for cycles. */
#ifndef EPOCHS
#define EPOCHS 4 /* that P closes in the whole run */
#define LOSSES 2 /* how often each side may take the other for lost */
#define DROPS 1  /* answers of the arbiter that get lost, or come too late */
#define ASKS 4   /* different questions of each side */
#endif
#ifndef RESTARTS
#define RESTARTS 1 /* of a daemon, in place; of either side, which is the same here */
#endif

mtype = { EMPTY, GUARDING, CLAIMING, DOUBTING, ALONE, PAIRED, ASKING, UNSURE, DEPOSED, DEAD };
mtype = { SOLO, PAIR };

/* ---- the arbiter's record; `written` is the question that wrote it, which makes each record unique ---- */
byte generation = 1;
bool b_owns = false;
mtype said = SOLO;
byte written = 0;

/* A question: whether B asks, what for, which record it expects, its own number. An answer names its question. */
chan questions = [3] of { bool, mtype, byte, byte };
chan to_p = [1] of { byte, bool };
chan to_b = [1] of { byte, bool };

/* ---- the nodes ---- */
mtype p = ALONE;
mtype b = EMPTY;
bool p_session = false, b_session = false;

byte epoch = 1;         /* that P's guest is in */
byte released = 0;      /* newest epoch of which something went out */
bool holding = false;   /* output commit is in force in QEMU */
bool pairing = false;   /* P has asked for the pairing of this session, and has no answer */
bool paired = false;    /* and has the answer */
bool p_away = false;    /* there is no session since a daemon is being replaced: P is to go on over another one */
byte p_waits = 0;       /* number of P's question that is not answered; 0: none */
byte p_expected = 0;
mtype p_want = SOLO;
byte p_asked = 0;

byte shadow = 0;        /* epoch of B's shadow; 0: none */
bool torn = false;      /* B's shadow has half a frame in it */
byte acknowledged = 0;  /* newest epoch that B has acknowledged in this session */
bool first = false;     /* the next frame completes a copy; any other one needs the one before it */
bool b_away = false;    /* the same as p_away: B keeps its shadow, and waits before it claims */
bool b_ever_ran = false;
byte b_waits = 0;
byte b_expected = 0;
byte b_asked = 0;

chan frames = [2] of { byte };
chan acks = [2] of { byte };
byte arriving = 0;      /* epoch whose frame has come half */

byte p_losses = 0, b_losses = 0, drops = 0, restarts = 0;
bool hope = false;      /* P died, and B could go on */

#define p_alive (p != DEAD && p != DEPOSED)
#define b_runs (b == ALONE)
#define flows (p == ALONE || (p == PAIRED && p_session && b_session) || b == ALONE)

inline flush() {
    do
    :: frames?_
    :: acks?_
    :: empty(frames) && empty(acks) -> break
    od;
    arriving = 0
}

inline release_all() {
    assert(!b_runs);           /* at most one side speaks */
    assert(!b_owns);
    released = epoch
}

/* ---- the arbiter: takes questions in any order of sides, answers, or the answer gets lost ---- */

active proctype Arbiter() {
    bool by_b; mtype want; byte expected, number; bool won;
end:
    do
    :: atomic {
        questions?by_b, want, expected, number ->
#ifdef NO_CAS
        won = true;
        if
        :: written != number ->
#else
        won = (written == expected || written == number);
        if
        :: written == expected && written != number ->
#endif
            written = number;
            b_owns = by_b;
            said = want;
            if
            :: want == SOLO -> generation++
            :: else
            fi
        :: else
        fi;
        if
        :: drops < DROPS -> drops++          /* lost, or too late: whoever asked is in doubt */
        :: by_b && b_waits == number && empty(to_b) -> to_b!number, won
        :: !by_b && p_waits == number && empty(to_p) -> to_p!number, won
        :: (by_b && b_waits != number) || (!by_b && p_waits != number)
        fi;
        by_b = false; want = SOLO; expected = 0; number = 0; won = false
       }
    od
}

/* ---- P ---- */

#ifdef NO_QUIET
#define ALL_COMMITTED true
#define RESUMABLE (b == GUARDING && b_away)
#else
#define ALL_COMMITTED (empty(frames) && empty(acks) && arriving == 0)
#define RESUMABLE (b == GUARDING && b_away && acknowledged == epoch - 1)
#endif
#define P_MAY_CONNECT (p == ALONE || p == ASKING || P_CARELESS)
#ifdef NO_DOUBT
#define P_CARELESS (p == UNSURE)
#define B_CARELESS (b == DOUBTING)
#else
#define P_CARELESS false
#define B_CARELESS false
#endif

active proctype P() {
    bool won; byte e, n;
end:
    do
    /* The guest runs. */
    :: atomic { p == ALONE && !holding -> release_all() ; released = epoch }

    /* A session begins; B throws its shadow away. */
    :: atomic { !p_session && !b_session && P_MAY_CONNECT && p_waits == 0 &&
                (b == EMPTY || b == CLAIMING || (b == GUARDING && b_away) || B_CARELESS) && b_waits == 0 ->
        flush();
        p_session = true; b_session = true; pairing = false; paired = false; b_away = false;
        b = EMPTY; shadow = 0; torn = false; acknowledged = 0; first = true }

    /* A daemon is to be replaced. Both sides agree when all that was closed is acknowledged; P may not hear it. */
    :: atomic { p == PAIRED && p_session && b_session && paired && b == GUARDING && restarts < RESTARTS &&
                ALL_COMMITTED ->
        flush();
        restarts++; p_session = false; b_session = false; b_away = true;
        if
        :: p_away = true
        :: p = ASKING; p_waits = 0
        fi }

    /* It is back: the session goes on with what both hold, if B has not given up to wait. */
    :: atomic { p == PAIRED && p_away && RESUMABLE ->
        flush();
        p_away = false; b_away = false; p_session = true; b_session = true }

    /* P gives up to wait: as if it had lost B. */
    :: atomic { p == PAIRED && p_away -> p_away = false; p_waits = 0;
#ifdef NO_HOLD
        p = ALONE; holding = false
#else
        p = ASKING
#endif
        }

    /* An epoch is closed: from the first checkpoint on output is held. */
    :: atomic { p_alive && p_session && epoch < EPOCHS && nfull(frames) ->
        frames!epoch;
        holding = true;
#ifdef RELEASE_EARLY
        released = epoch;
#endif
        epoch++ }

    /* An acknowledgement: its epoch goes out, unless output was held before and belongs to nobody. */
    :: atomic { p_session && (p == ALONE || p == PAIRED || p == ASKING || P_CARELESS) && nempty(acks) ->
        acks?e;
        /* First commit: from here on P holds when it loses B, whatever becomes of the question. */
#ifdef NO_PAIRING
        if
        :: p == ASKING -> p = PAIRED
        :: else
        fi;
#else
        p = PAIRED;
#endif
        assert(!b_owns || e <= shadow);   /* B's guest has it in its past */
        if
        :: e > released -> released = e
        :: else
        fi; e = 0 }

    /* The pairing is written down. */
    :: atomic { p == PAIRED && p_session && !paired && p_waits == 0 && p_asked < ASKS && nfull(questions) ->
        if
        :: b_owns -> p = DEPOSED; p_session = false
        :: else ->
            p_asked++; p_waits = 10 + p_asked; p_expected = written; p_want = PAIR; pairing = true;
            questions!false, PAIR, p_expected, p_waits
        fi }

    /* B is taken for lost. */
    :: atomic { p_session && (p_losses < LOSSES || !b_session || b == DEAD) ->
        if
        :: b_session && b != DEAD -> p_losses++
        :: else
        fi;
        p_session = false;
        if
        :: p == PAIRED -> p = ASKING; p_waits = 0
        :: p == ALONE -> holding = false
        :: else
        fi }

    /* The question for solo, and the same one again while nobody has answered it. */
    :: atomic { p == ASKING && !p_session && p_waits == 0 && p_asked < ASKS + LOSSES + 1 && nfull(questions) ->
        if
        :: b_owns -> p = DEPOSED
        :: else ->
            p_asked++; p_waits = 10 + p_asked; p_expected = written; p_want = SOLO;
            questions!false, SOLO, p_expected, p_waits
        fi }
#ifndef NO_RETRY
    :: atomic { (p == ASKING || p == UNSURE) && !p_session && p_waits != 0 && empty(to_p) && empty(questions) ->
        p = UNSURE; questions!false, SOLO, p_expected, p_waits }
#endif

    /* No answer within the time limit. */
    :: atomic { p == ASKING && !p_session && p_waits != 0 && empty(to_p) ->
        p = UNSURE;
#ifdef NO_DOUBT
        p_waits = 0
#endif
        }
    /* The same for the pairing; the time limit is the end of it, and it is asked again. */
    :: atomic { p == PAIRED && p_waits != 0 && p_session && empty(to_p) && empty(questions) ->
        questions!false, PAIR, p_expected, p_waits }

    :: atomic { nempty(to_p) ->
        to_p?n, won;
        if
        :: p_waits != n /* of a question that no longer matters */
        :: p_waits == n && won && p_want == PAIR -> paired = true; p_waits = 0
        :: p_waits == n && won && p_want == SOLO && (p == ASKING || p == UNSURE) ->
            p_waits = 0; p = ALONE; holding = false;
            assert(!b_runs)
        :: p_waits == n && !won && b_owns -> p_waits = 0; p = DEPOSED; p_session = false
        :: p_waits == n && !won && !b_owns -> p_waits = 0;
            if
            :: p == UNSURE -> p = ASKING
            :: else
            fi
        fi; won = false; n = 0 }

    /* The host dies. */
    :: atomic { p_alive && b != DEAD ->
        if
        /* Not while P's own question may yet be granted. */
        :: p == PAIRED && (b == GUARDING || b == CLAIMING || b == DOUBTING) && said == PAIR -> hope = true
        :: else
        fi;
        p = DEAD; p_session = false; p_away = false; holding = false; p_waits = 0 }
    od
}

/* ---- B ---- */

active proctype B() {
    bool won; byte n;
end:
    do
    /* A frame comes in two parts; it is acknowledged, and then applied, when it is whole. */
    :: atomic { b_session && (b == EMPTY || b == GUARDING) && arriving == 0 && nempty(frames) ->
        frames?arriving;
#ifdef TAKE_UNACKED
        torn = true; shadow = arriving;
        b = GUARDING
#endif
        }
    :: atomic { b_session && (b == EMPTY || b == GUARDING) && arriving != 0 && nfull(acks) ->
        if
        :: first -> first = false; torn = false
        :: !first && arriving != shadow + 1 -> torn = true
        :: else
        fi;
        shadow = arriving; acknowledged = arriving;
        if
        :: p_session -> acks!arriving
        :: else
        fi;
        arriving = 0; b = GUARDING }

    /* P is taken for lost; half a frame is thrown away. */
    :: atomic { b_session && (b_losses < LOSSES || !p_session || p == DEAD) ->
        if
        :: p_session && p != DEAD -> b_losses++
        :: else
        fi;
        b_session = false; arriving = 0;
        if
        :: b == GUARDING -> b = CLAIMING
        :: else
        fi }

    /* The time to wait for a daemon that is being replaced is over. */
    :: atomic { b == GUARDING && b_away -> b_away = false; b = CLAIMING }

    /* The question for generation + 1. Only a record that names B as the backup lets it ask. */
    :: atomic { b == CLAIMING && !b_session && b_waits == 0 && nfull(questions) ->
        if
#if defined(NO_CAS) || defined(NO_PAIRING)
        :: !b_owns && b_asked < ASKS ->
#else
        :: said != PAIR || b_owns -> b = EMPTY; shadow = 0; torn = false
        :: said == PAIR && !b_owns && b_asked < ASKS ->
#endif
            b_asked++; b_waits = 100 + b_asked; b_expected = written;
            questions!true, SOLO, b_expected, b_waits
        :: else
        fi }
    :: atomic { (b == CLAIMING || b == DOUBTING) && b_waits != 0 && empty(to_b) && empty(questions) ->
        b = DOUBTING; questions!true, SOLO, b_expected, b_waits }
    :: atomic { b == CLAIMING && b_waits != 0 && empty(to_b) ->
        b = DOUBTING;
#ifdef NO_DOUBT
        b_waits = 0
#endif
        }
    :: atomic { nempty(to_b) ->
        to_b?n, won;
        if
        :: b_waits != n
        :: b_waits == n && won && (b == CLAIMING || b == DOUBTING) ->
            b_waits = 0;
            /* The takeover. */
            assert(!torn && shadow == acknowledged);
            assert(released <= shadow);
            assert(p != ALONE);
            b = ALONE; b_ever_ran = true
        :: b_waits == n && !won && !b_owns && said == PAIR -> b_waits = 0; b = CLAIMING /* only another write of P's */
        :: b_waits == n && !won && (b_owns || said != PAIR) -> b_waits = 0; b = EMPTY; shadow = 0; torn = false
        :: else -> b_waits = 0
        fi; won = false; n = 0 }

    /* The host dies: one of the two at most. */
    :: atomic { b != DEAD && b != ALONE && p_alive ->
        b = DEAD; b_session = false; b_away = false; b_waits = 0; arriving = 0 }
    od
}

/*
 * One of the two hosts lives, and so does the arbiter: in the end output flows. But for a guest that died with
 * P when no shadow could be started, and for a B that won and died, whose guest P must not run: two failures.
 * `spent`: the run is over since nobody has a question left.
 */
#define hopeless ((p == DEAD && !hope && b != ALONE) || (b_owns && b == DEAD))
#define spent (p_asked >= ASKS)
ltl speaks { <>[](flows || hopeless || spent) }
