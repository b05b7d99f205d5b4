//go:build ignore

// Pause is the process that holds a pod's namespaces open.
//
// It is process 1 of the pod's pid namespace when the containers share one, so
// it also collects the children that lost their parent. It needs no library:
// it is a static program of a few pages, the same source for every
// architecture below.

#define SYS(name) (long)SYS_##name

#if defined(__x86_64__)
enum { SYS_write = 1, SYS_rt_sigprocmask = 14, SYS_getpid = 39, SYS_wait4 = 61, SYS_rt_sigtimedwait = 128, SYS_exit_group = 231 };

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
enum { SYS_write = 64, SYS_exit_group = 94, SYS_rt_sigprocmask = 135, SYS_rt_sigtimedwait = 137, SYS_getpid = 172, SYS_wait4 = 260 };

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
#error "pause: no system call convention for this architecture"
#endif

enum { SIGINT = 2, SIGTERM = 15, SIGCHLD = 17, SIG_BLOCK = 0, WNOHANG = 1 };

// The kernel's signal set: bit n-1 stands for signal n.
typedef unsigned long sigset;
#define SIGBIT(n) (1ul << ((n)-1))

static const char warning[] = "pause: not process 1: orphans are collected by somebody else\n";

__attribute__((noreturn, used)) void run(void)
{
	// Waiting for blocked signals, instead of handling them, leaves no moment
	// in which one can be missed.
	sigset set = SIGBIT(SIGINT) | SIGBIT(SIGTERM) | SIGBIT(SIGCHLD);
	call(SYS(rt_sigprocmask), SIG_BLOCK, (long)&set, 0, sizeof set);
	if (call(SYS(getpid), 0, 0, 0, 0) != 1)
		call(SYS(write), 2, (long)warning, sizeof warning - 1, 0);
	for (;;) {
		// One pending SIGCHLD may stand for many children. Children that
		// were there before the first signal are collected here too.
		while (call(SYS(wait4), -1, 0, WNOHANG, 0) > 0)
			;
		long sig = call(SYS(rt_sigtimedwait), (long)&set, 0, 0, sizeof set);
		if (sig == SIGINT || sig == SIGTERM)
			call(SYS(exit_group), 0, 0, 0, 0);
	}
}
