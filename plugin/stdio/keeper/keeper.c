//go:build ignore

// Keeper holds the reading ends of FIFOs open for a daemon that may go away: a
// FIFO that nobody has open forgets what is in it.
//
// It is started with a listening SOCK_SEQPACKET socket as file 3, and leaves
// the process that started it at once. It ends when it holds nothing and nobody
// is connected. It allocates nothing and links no library: what it can hold is
// the table below, what it reads of a packet is the buffer in serve.
//
// A packet is a letter and what the letter says, the files come with it:
//
//	K name   hold these files, 1 to FILES; those held under the name are let go
//	D name   let go of the files of a name; there need be none
//	L n      the n-th name, n being an int of this machine
//
// A reply is a byte, one of the enumeration below, and for L the name. A keeper
// may be older than the daemon that speaks to it, so what is said here stays.

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>

#if defined(__x86_64__)
static long call(long n, long a, long b, long c, long d)
{
	register long r10 __asm__("r10") = d;
	long ret;
	__asm__ volatile("syscall"
			 : "=a"(ret)
			 : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10)
			 : "rcx", "r11", "memory");
	return ret;
}

// The kernel enters with the stack aligned as a call would not leave it.
__asm__(".globl _start\n"
	"_start:\n"
	"	xor %ebp, %ebp\n"
	"	and $-16, %rsp\n"
	"	call run\n");
#elif defined(__aarch64__)
static long call(long n, long a, long b, long c, long d)
{
	register long x8 __asm__("x8") = n;
	register long x0 __asm__("x0") = a;
	register long x1 __asm__("x1") = b;
	register long x2 __asm__("x2") = c;
	register long x3 __asm__("x3") = d;
	__asm__ volatile("svc 0"
			 : "+r"(x0)
			 : "r"(x8), "r"(x1), "r"(x2), "r"(x3)
			 : "memory");
	return x0;
}

__asm__(".globl _start\n"
	"_start:\n"
	"	mov x29, #0\n"
	"	mov x30, #0\n"
	"	bl run\n");
#else
#error "keeper: no system call convention for this architecture"
#endif

enum {
	LISTENER = 3,
	CLIENTS = 32,
	NAMES = 8192,
	NAME = 255, // bytes of a name
	FILES = 4,  // of one name
	SPARE = CLIENTS + FILES + 8, // files that are not held
};

enum { DONE, MALFORMED, FULL, NO_FIFO, NO_MORE };

static struct holding {
	int len, files;
	int file[FILES];
	char name[NAME];
} held[NAMES]; // the first ones are in use
static int names, files, most_files;

// The listener, then the clients.
static struct pollfd polled[1 + CLIENTS];
static int clients;

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

static void close_all(const int *file, int n)
{
	for (int i = 0; i < n; i++)
		call(SYS_close, file[i], 0, 0, 0);
}

static int find(const char *name, int len)
{
	for (int i = 0; i < names; i++) {
		int at = 0;
		while (held[i].len == len && at < len && held[i].name[at] == name[at])
			at++;
		if (at == len)
			return i;
	}
	return -1;
}

// all_fifos wants reading ends: with a writing end held, no end of output would
// ever be seen.
static int all_fifos(const int *file, int n)
{
	for (int i = 0; i < n; i++) {
		struct stat st;
		if (call(SYS_fstat, file[i], (long)&st, 0, 0) != 0 || !S_ISFIFO(st.st_mode))
			return 0;
		long flags = call(SYS_fcntl, file[i], F_GETFL, 0, 0);
		if (flags < 0 || (flags & O_ACCMODE) != O_RDONLY)
			return 0;
	}
	return 1;
}

// keep takes the files over when it returns DONE.
static int keep(const char *name, int len, const int *file, int n)
{
	if (!all_fifos(file, n))
		return NO_FIFO;
	int i = find(name, len);
	int before = i < 0 ? 0 : held[i].files;
	if ((i < 0 && names == NAMES) || files - before + n > most_files)
		return FULL;
	if (i < 0)
		i = names++;
	else
		close_all(held[i].file, before);
	files += n - before;
	held[i].len = len;
	held[i].files = n;
	memcpy(held[i].name, name, len);
	memcpy(held[i].file, file, n * sizeof *file);
	return DONE;
}

static void drop(const char *name, int len)
{
	int i = find(name, len);
	if (i < 0)
		return;
	close_all(held[i].file, held[i].files);
	files -= held[i].files;
	names--;
	if (i != names)
		held[i] = held[names];
}

// received finds the files that came with a packet. The kernel puts them all
// into one header, and never more than there is room for.
static int received(struct msghdr *m, int *file)
{
	struct cmsghdr *c = CMSG_FIRSTHDR(m);
	if (!c || c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS || c->cmsg_len < CMSG_LEN(0))
		return 0;
	unsigned long n = (c->cmsg_len - CMSG_LEN(0)) / sizeof *file;
	if (n > FILES)
		n = FILES;
	memcpy(file, CMSG_DATA(c), n * sizeof *file);
	return n;
}

// serve answers one packet; 0 means that the client is gone or not worth it.
static int serve(int client)
{
	char body[1 + NAME + 1]; // one byte more than any good packet
	union {
		char bytes[CMSG_SPACE(sizeof(int) * FILES)];
		struct cmsghdr aligned;
	} control;
	struct iovec text = {body, sizeof body};
	struct msghdr m = {.msg_iov = &text, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
	long n = call(SYS_recvmsg, client, (long)&m, MSG_CMSG_CLOEXEC, 0);
	if (n == -EAGAIN || n == -EINTR)
		return 1;
	if (n < 0)
		return 0;
	int file[FILES];
	int got = received(&m, file);
	if (n == 0) {
		close_all(file, got);
		return 0;
	}

	char reply[1 + NAME] = {MALFORMED};
	int len = n - 1, size = 1, kept = 0;
	if (m.msg_flags & MSG_CTRUNC) {
		reply[0] = FULL;
	} else if (n < 2 || n > 1 + NAME) {
		;
	} else if (body[0] == 'K' && got > 0) {
		reply[0] = keep(body + 1, len, file, got);
		kept = reply[0] == DONE;
	} else if (body[0] == 'D' && got == 0) {
		drop(body + 1, len);
		reply[0] = DONE;
	} else if (body[0] == 'L' && got == 0 && len == sizeof(int)) {
		int i;
		memcpy(&i, body + 1, sizeof i);
		reply[0] = NO_MORE;
		if (i >= 0 && i < names) {
			reply[0] = DONE;
			memcpy(reply + 1, held[i].name, held[i].len);
			size += held[i].len;
		}
	}
	if (!kept)
		close_all(file, got);
	return call(SYS_write, client, (long)reply, size, 0) == size;
}

static void welcome(void)
{
	while (clients < CLIENTS) {
		long fd = call(SYS_accept4, LISTENER, 0, 0, SOCK_CLOEXEC | SOCK_NONBLOCK);
		if (fd == -EAGAIN)
			return;
		if (fd < 0) {
			// Out of something for now: better slow than busy.
			struct timespec pause = {0, 100 * 1000 * 1000};
			call(SYS_ppoll, 0, 0, (long)&pause, 0);
			return;
		}
		polled[1 + clients++] = (struct pollfd){.fd = fd, .events = POLLIN};
	}
}

// raise allows as many files as there could ever be to hold, or as many as it
// may.
static void raise_limit(void)
{
	const unsigned long want = NAMES * FILES + SPARE;
	struct rlimit now = {0, 0};
	call(SYS_prlimit64, 0, RLIMIT_NOFILE, 0, (long)&now);
	struct rlimit more = {want, now.rlim_max > want ? now.rlim_max : want};
	if (now.rlim_cur < want && call(SYS_prlimit64, 0, RLIMIT_NOFILE, (long)&more, 0) != 0) {
		more = (struct rlimit){now.rlim_max, now.rlim_max};
		call(SYS_prlimit64, 0, RLIMIT_NOFILE, (long)&more, 0);
	}
	call(SYS_prlimit64, 0, RLIMIT_NOFILE, 0, (long)&now);
	most_files = now.rlim_cur > want ? NAMES * FILES : (int)now.rlim_cur - SPARE;
}

__attribute__((noreturn, used)) void run(void)
{
	// First, so that the one that stays never has them.
	unsigned long blocked = 1ul << (SIGHUP - 1) | 1ul << (SIGPIPE - 1);
	call(SYS_rt_sigprocmask, SIG_BLOCK, (long)&blocked, 0, sizeof blocked);
	// The daemon waits for this process, not for the one that stays.
	long child = call(SYS_clone, SIGCHLD, 0, 0, 0);
	if (child != 0)
		call(SYS_exit_group, child < 0, 0, 0, 0);
	call(SYS_setsid, 0, 0, 0, 0);
	call(SYS_chdir, (long)"/", 0, 0, 0);
	raise_limit();
	if (call(SYS_fcntl, LISTENER, F_SETFL, O_NONBLOCK, 0) != 0)
		call(SYS_exit_group, 1, 0, 0, 0);
	polled[0].fd = LISTENER;
	for (;;) {
		welcome();
		if (names == 0 && clients == 0)
			call(SYS_exit_group, 0, 0, 0, 0);
		polled[0].events = clients < CLIENTS ? POLLIN : 0;
		if (call(SYS_ppoll, (long)polled, 1 + clients, 0, 0) < 0)
			continue;
		for (int i = clients; i > 0; i--) {
			if (!polled[i].revents || serve(polled[i].fd))
				continue;
			call(SYS_close, polled[i].fd, 0, 0, 0);
			polled[i] = polled[clients--];
		}
	}
}
