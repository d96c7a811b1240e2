"""The child's side of `regimen.rewards.sandbox`: a keeper that confines one program and watches it.

The keeper is a Python process of its own that knows only the standard library. A fresh process has one thread, as
user namespaces ask for, and starts in milliseconds; nothing here runs in, or forks from, the process that trains.

    keeper          watches time, memory and processes; kills; reports
      entrance      has entered fresh user, mount, pid, network and IPC namespaces
        init        process 1 of the pid namespace: when it ends, the kernel ends all that is in there
          program   no privileges, no sockets, resource limits; sees the system read-only, and one scratch folder

Where namespaces are not allowed, the program is the keeper's child: limits, the ban on sockets and the watch hold, it
cannot signal its keeper, and files are as open to it as to the user who trains.
"""
