//go:build ignore

// Anchor is the parent of the supervisor: what containers leave, and the first
// processes of containers, come to it when their parent ends, and how those ended
// is known by it when the supervisor is dead.
//
// It is started as
//
//	gantry-anchor SOCKET PROGRAM ARGUMENT...
//
// with three files: 3 is the program's, 4 a listening SOCK_SEQPACKET socket, which
// has the name SOCKET, and 5 a pipe. When a byte comes from the pipe the program is
// executed as a child; when none comes the anchor ends. It becomes the reaper of all
// that is orphaned below it. It ends, and removes the socket, when it has no child,
// nobody is connected, and there is nobody whose end it is to tell.
//
// It allocates nothing and links no library: what it can keep is the table below.
// A packet is an operation and a number, a reply is a result and three numbers, all
// of 64 bits:
//
//	H        reap nothing, as often as there is no R for it
//	R        reap again
//	K pid    keep how this child ends, for this connection: 1 is its ID
//	P id     keep it also when the connection has ended
//	D id     forget it; it need not be there
//	S id     how it ended: 1 is its wait status, 2 and 3 when, in s and ns
//
// What a connection has held and kept ends with it. An anchor may be older than the
// supervisor that speaks to it, so what is said here stays.

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>

#if defined(__x86_64__)
static long call(long n, long a, long b, long c, long d, long e)
{
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	long ret;
	__asm__ volatile("syscall"
			 : "=a"(ret)
			 : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8)
			 : "rcx", "r11", "memory");
	return ret;
}

// The kernel enters with the arguments on the stack, and the stack aligned as a
// call would not leave it.
__asm__(".globl _start\n"
	"_start:\n"
	"	xor %ebp, %ebp\n"
	"	mov %rsp, %rdi\n"
	"	and $-16, %rsp\n"
	"	call run\n");
#elif defined(__aarch64__)
static long call(long n, long a, long b, long c, long d, long e)
{
	register long x8 __asm__("x8") = n;
	register long x0 __asm__("x0") = a;
	register long x1 __asm__("x1") = b;
	register long x2 __asm__("x2") = c;
	register long x3 __asm__("x3") = d;
	register long x4 __asm__("x4") = e;
	__asm__ volatile("svc 0"
			 : "+r"(x0)
			 : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4)
			 : "memory");
	return x0;
}

__asm__(".globl _start\n"
	"_start:\n"
	"	mov x29, #0\n"
	"	mov x30, #0\n"
	"	mov x0, sp\n"
	"	bl run\n");
#else
#error "anchor: no system call convention for this architecture"
#endif

enum {
	WORD = 3, // the program's
	LISTENER = 4,
	GATE = 5,
	CLIENTS = 32,
	KEPT = 16384,
};

enum { DONE, MALFORMED, FULL, NO_CHILD, UNKNOWN, RUNS };

static struct kept {
	long id, at, at_nsec;
	int pid, status, ended;
	int owner; // the client's file; 0 when it is for longer
} kept[KEPT]; // the first ones are in use
static int used;
static long last_id;

// The children's ends, the listener, then the clients.
enum { ENDS, DOOR, FIRST };
static struct pollfd polled[FIRST + CLIENTS];
static int holds[FIRST + CLIENTS]; // of each client
static int clients, holding;

struct packet {
	long operation, number;
};

struct reply {
	long result, number[3];
};

// The compiler makes calls of these out of assignments. The empty statements
// keep it from making them out of the loops in here.
void *memcpy(void *to, const void *from, unsigned long n)
{
	for (unsigned long i = 0; i < n; i++) {
		((char *)to)[i] = ((const char *)from)[i];
		__asm__ volatile("");
	}
	return to;
}

void *memset(void *to, int c, unsigned long n)
{
	for (unsigned long i = 0; i < n; i++) {
		((char *)to)[i] = c;
		__asm__ volatile("");
	}
	return to;
}

static struct kept *by_id(long id)
{
	for (int i = 0; i < used; i++)
		if (kept[i].id == id)
			return &kept[i];
	return 0;
}

// by_pid finds a child that has not been reaped: until then the number is its own.
static struct kept *by_pid(int pid)
{
	for (int i = 0; i < used; i++)
		if (kept[i].pid == pid && !kept[i].ended)
			return &kept[i];
	return 0;
}

static void drop(struct kept *k)
{
	used--;
	if (k != &kept[used])
		*k = kept[used];
}

static void note(struct kept *k, int status)
{
	struct timespec now = {0, 0};
	call(SYS_clock_gettime, CLOCK_REALTIME, (long)&now, 0, 0, 0);
	k->ended = 1;
	k->status = status;
	k->at = now.tv_sec;
	k->at_nsec = now.tv_nsec;
}

// sweep reaps what has ended, unless somebody holds that. It returns 0 when no child
// is left.
static int sweep(void)
{
	while (!holding) {
		int status = 0;
		long pid = call(SYS_wait4, -1, (long)&status, WNOHANG, 0, 0);
		if (pid <= 0)
			return pid != -ECHILD;
		struct kept *k = by_pid(pid);
		if (k)
			note(k, status);
	}
	return 1;
}

static int is_child(int pid)
{
	siginfo_t si;
	return pid > 0 && call(SYS_waitid, P_PID, pid, (long)&si, WEXITED | WNOHANG | WNOWAIT, 0) == 0;
}

static void keep(struct reply *r, int pid, int owner)
{
	if (!is_child(pid)) {
		r->result = NO_CHILD;
		return;
	}
	struct kept *k = by_pid(pid);
	if (!k) {
		if (used == KEPT) {
			r->result = FULL;
			return;
		}
		k = &kept[used++];
		*k = (struct kept){.id = ++last_id, .pid = pid, .owner = owner};
	}
	r->result = DONE;
	r->number[0] = k->id;
}

static void tell(struct reply *r, struct kept *k)
{
	// It may have ended a moment ago, or while somebody holds.
	int status = 0;
	if (!k->ended && call(SYS_wait4, k->pid, (long)&status, WNOHANG, 0, 0) == k->pid)
		note(k, status);
	r->result = k->ended ? DONE : RUNS;
	r->number[0] = k->status;
	r->number[1] = k->at;
	r->number[2] = k->at_nsec;
}

// answer does what a packet of the i-th file says.
static void answer(struct reply *r, const struct packet *p, int i)
{
	struct kept *k;
	switch (p->operation) {
	case 'H':
		holds[i]++;
		holding++;
		r->result = DONE;
		return;
	case 'R':
		if (holds[i] > 0) {
			holds[i]--;
			holding--;
			r->result = DONE;
		}
		return;
	case 'K':
		keep(r, p->number, polled[i].fd);
		return;
	case 'P':
	case 'D':
	case 'S':
		break;
	default:
		return;
	}
	k = by_id(p->number);
	r->result = p->operation == 'D' ? DONE : UNKNOWN;
	if (!k)
		return;
	if (p->operation == 'S') {
		tell(r, k);
	} else if (p->operation == 'D') {
		drop(k);
	} else {
		k->owner = 0;
		r->result = DONE;
	}
}

// serve answers one packet; 0 means that the client is gone or not worth it.
static int serve(int i)
{
	struct packet p[2]; // more than any good one
	long n = call(SYS_read, polled[i].fd, (long)p, sizeof p, 0, 0);
	if (n == -EAGAIN || n == -EINTR)
		return 1;
	if (n <= 0)
		return 0;
	struct reply r = {.result = MALFORMED};
	if (n == sizeof *p)
		answer(&r, p, i);
	return call(SYS_write, polled[i].fd, (long)&r, sizeof r, 0, 0) == sizeof r;
}

// leave ends what a client has held and kept.
static void leave(int i)
{
	int fd = polled[i].fd;
	for (int k = used - 1; k >= 0; k--)
		if (kept[k].owner == fd)
			drop(&kept[k]);
	holding -= holds[i];
	call(SYS_close, fd, 0, 0, 0, 0);
	int last = FIRST + --clients;
	polled[i] = polled[last];
	holds[i] = holds[last];
	holds[last] = 0;
}

static void welcome(void)
{
	while (clients < CLIENTS) {
		long fd = call(SYS_accept4, LISTENER, 0, 0, SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
		if (fd == -EAGAIN)
			return;
		if (fd < 0) {
			// Out of something for now: better slow than busy.
			struct timespec pause = {0, 100 * 1000 * 1000};
			call(SYS_ppoll, 0, 0, (long)&pause, 0, 0);
			return;
		}
		polled[FIRST + clients] = (struct pollfd){.fd = fd, .events = POLLIN};
		clients++;
	}
}

// begin executes the program with the signals as they were.
static void begin(char **argv, char **envp, const unsigned long *mask)
{
	static const char failed[] = "the supervisor cannot be executed by its anchor";
	if (call(SYS_clone, SIGCHLD, 0, 0, 0, 0) != 0)
		return;
	call(SYS_close, LISTENER, 0, 0, 0, 0);
	call(SYS_close, GATE, 0, 0, 0, 0);
	call(SYS_rt_sigprocmask, SIG_SETMASK, (long)mask, 0, sizeof *mask, 0);
	call(SYS_execve, (long)argv[0], (long)argv, (long)envp, 0, 0);
	call(SYS_write, WORD, (long)failed, sizeof failed - 1, 0, 0);
	call(SYS_exit_group, 1, 0, 0, 0, 0);
}

// prepare makes this process the reaper, and lets no signal end it.
static void prepare(unsigned long *before)
{
	unsigned long all = ~0ul, ends = 1ul << (SIGCHLD - 1);
	// Ends of children that are ignored are not told. The kernel's struct is the
	// handler, flags, a restorer and the mask.
	const long usual[4] = {0};
	call(SYS_rt_sigaction, SIGCHLD, (long)usual, 0, sizeof all, 0);
	call(SYS_rt_sigprocmask, SIG_SETMASK, (long)&all, (long)before, sizeof all, 0);
	call(SYS_prctl, PR_SET_NAME, (long)"gantry-anchor", 0, 0, 0);
	if (call(SYS_prctl, PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0)
		call(SYS_exit_group, 1, 0, 0, 0, 0);
	long fd = call(SYS_signalfd4, -1, (long)&ends, sizeof ends, SFD_CLOEXEC | SFD_NONBLOCK, 0);
	if (fd < 0 || call(SYS_fcntl, LISTENER, F_SETFL, O_NONBLOCK, 0, 0) != 0)
		call(SYS_exit_group, 1, 0, 0, 0, 0);
	polled[ENDS] = (struct pollfd){.fd = fd, .events = POLLIN};
	polled[DOOR].fd = LISTENER;
}

// hide takes what is the program's out of this process's command line, by which
// others find that.
static void hide(char **argv)
{
	for (; *argv; argv++)
		for (char *c = *argv; *c; c++)
			*c = 0;
}

__attribute__((noreturn, used)) void run(long *stack)
{
	char **argv = (char **)(stack + 1), **envp = argv + stack[0] + 1;
	unsigned long mask = 0;
	char go;
	if (stack[0] < 3 || call(SYS_read, GATE, (long)&go, 1, 0, 0) != 1)
		call(SYS_exit_group, 2, 0, 0, 0, 0);
	prepare(&mask);
	begin(argv + 2, envp, &mask);
	hide(argv + 2);
	call(SYS_close, WORD, 0, 0, 0, 0);
	call(SYS_close, GATE, 0, 0, 0, 0);
	for (;;) {
		int children = sweep();
		welcome();
		if (!children && !clients && !used) {
			call(SYS_unlinkat, AT_FDCWD, (long)argv[1], 0, 0, 0);
			call(SYS_exit_group, 0, 0, 0, 0, 0);
		}
		polled[DOOR].events = clients < CLIENTS ? POLLIN : 0;
		if (call(SYS_ppoll, (long)polled, FIRST + clients, 0, 0, 0) < 0)
			continue;
		struct signalfd_siginfo told;
		if (polled[ENDS].revents)
			call(SYS_read, polled[ENDS].fd, (long)&told, sizeof told, 0, 0);
		for (int i = FIRST + clients - 1; i >= FIRST; i--)
			if (polled[i].revents && !serve(i))
				leave(i);
	}
}
