#!/usr/bin/env bash
# A throw-away Slurm on one machine, for tests: real daemons, and nodes that lose power or their network when told to.
#
#   cluster.sh up N         munged, slurmctld and N nodes n1, n2, ...; returns when all are idle, after a second or two
#   cluster.sh exec CMD     run CMD where the controller lives
#   cluster.sh node I CMD   run CMD on node I
#   cluster.sh crash I      power node I off: every process of it is gone at once; boot I starts it again
#   cluster.sh cut I        pull its cable; heal I puts it back
#   cluster.sh down         end all of it, by recorded process ids
#
# A node is a network, host name, mount and process namespace with a bash as its init; killing that kills the node. Nodes share the
# file system, except their own /mnt, and a bridge that leads nowhere: no packet leaves the machine. Needs root, and of Debian 12
# the packages slurmctld, slurmd (22.05, built with multiple-slurmd), slurm-client, munge, iproute2. CLUSTER_DIR holds its state.
set -uo pipefail
dir=${CLUSTER_DIR:-/tmp/imitate_ds-cluster} prefix=${CLUSTER_PREFIX:-imt} # of the namespaces' names
cpus=2 gpus=2                                                            # that each node claims; the GPUs exist for Slurm alone
export SLURM_CONF=$dir/slurm.conf
nodes=$(cat "$dir/nodes" 2>/dev/null)

address() { echo "10.77.0.$((10 + $1))"; }

configuration() {
  cat <<END
ClusterName=$prefix
SlurmctldHost=ctl(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort=16817
SlurmdPort=16818
SlurmctldPidFile=$dir/pid/slurmctld
SlurmdPidFile=$dir/spool/%n/pid
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=15
TCPTimeout=2
MessageTimeout=10
KillWait=10
MinJobAge=3600
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0,requeue_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
RebootProgram=/bin/true
END
  for i in $(seq "$nodes"); do
    echo "NodeName=n$i NodeAddr=$(address "$i") CPUs=$cpus Sockets=1 CoresPerSocket=$cpus RealMemory=4000 Gres=gpu:$gpus State=UNKNOWN"
  done
  echo "PartitionName=train Nodes=n[1-$nodes] Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=30"
  echo "PartitionName=urgent Nodes=n[1-$nodes] MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF"
}

lay_out() {
  mkdir -p "$dir"/{munge,pid,state,log,gpu} || exit 1
  for i in $(seq "$nodes"); do mkdir -p "$dir/spool/n$i"; done
  echo "$nodes" >"$dir/nodes"
  { echo "127.0.0.1 localhost"; echo "10.77.0.1 ctl"; for i in $(seq "$nodes"); do echo "$(address "$i") n$i"; done; } >"$dir/hosts"
  configuration >"$SLURM_CONF"
  # slurmd wants character devices: copies of /dev/null.
  for g in $(seq 0 $((gpus - 1))); do mknod "$dir/gpu/nvidia$g" c 1 3 2>/dev/null; done
  echo "NodeName=n[1-$nodes] Name=gpu File=$dir/gpu/nvidia[0-$((gpus - 1))]" >"$dir/gres.conf"
  # slurmd 22.05 loads its cgroup plugin whatever tracks processes; that of v1 also starts where no cgroups are mounted.
  [[ -d /sys/fs/cgroup/systemd || -e /sys/fs/cgroup/cgroup.controllers ]] || echo CgroupPlugin=cgroup/v1 >"$dir/cgroup.conf"
  (umask 077; head -c 128 /dev/urandom >"$dir/munge/key")
}

connect() {
  ip netns add "${prefix}c"
  ip -n "${prefix}c" link set lo up
  ip -n "${prefix}c" link add br0 type bridge
  ip -n "${prefix}c" addr add 10.77.0.1/24 dev br0
  ip -n "${prefix}c" link set br0 up
  for i in $(seq "$nodes"); do
    ip netns add "$prefix$i"
    ip -n "$prefix$i" link set lo up
    ip link add "v$i" netns "${prefix}c" type veth peer name eth0 netns "$prefix$i"
    ip -n "${prefix}c" link set "v$i" master br0 up
    ip -n "$prefix$i" addr add "$(address "$i")/24" dev eth0
    ip -n "$prefix$i" link set eth0 up
  done
}

at_controller() { # its network, host name and hosts file
  # shellcheck disable=SC2016
  nsenter --net="/run/netns/${prefix}c" unshare -u -m --propagation private \
    sh -c 'hostname ctl; mount --bind "$0" /etc/hosts; exec "$@"' "$dir/hosts" "$@"
}

boot() {
  # shellcheck disable=SC2016
  setsid nsenter --net="/run/netns/$prefix$1" unshare -u -m -p -f --kill-child=KILL --propagation private --mount-proc \
    bash -c 'hostname "$1"; mount --bind "$2/hosts" /etc/hosts; mount -t tmpfs -o size=1g tmpfs /mnt
             slurmd -D -N "$1" -f "$2/slurm.conf" & while :; do wait -n; [ $? = 127 ] && sleep 1; done' \
    _ "n$1" "$dir" >>"$dir/log/n$1.out" 2>&1 </dev/null &
  echo $! >"$dir/pid/n$1"
}

up() {
  [[ ! -e $dir/nodes ]] || { echo "already up in $dir; $0 down" >&2; exit 1; }
  nodes=$1
  lay_out
  connect
  # One munged serves all nodes by its socket: they share the file system. --force: in a folder of ours, which others cannot enter.
  setsid munged -F --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/munge/pid" \
    --log-file="$dir/log/munged.log" --seed-file="$dir/munge/seed" --num-threads=2 >"$dir/log/munged.out" 2>&1 </dev/null &
  echo $! >"$dir/pid/munged"
  for _ in {1..50}; do [[ -S $dir/munge/socket ]] && break; sleep .1; done
  [[ -S $dir/munge/socket ]] || { cat "$dir/log/munged.out" >&2; exit 1; }
  at_controller setsid slurmctld -D -f "$SLURM_CONF" >"$dir/log/slurmctld.out" 2>&1 </dev/null &
  for i in $(seq "$nodes"); do boot "$i"; done
  for _ in {1..100}; do
    [[ $(at_controller sinfo -h -N -t idle -p train -o %N 2>/dev/null | wc -l) == "$nodes" ]] && return 0
    sleep .2
  done
  echo "the nodes did not become idle; see $dir/log" >&2
  exit 1
}

down() {
  [[ -e $dir/nodes ]] || return 0
  at_controller timeout 10 scancel --quiet -u root 2>/dev/null
  sleep 1
  for file in "$dir"/pid/n[0-9]* "$dir/pid/slurmctld" "$dir/pid/munged"; do
    pid=$(cat "$file" 2>/dev/null) || continue
    [[ $file == */n* ]] || { kill "$pid" && timeout 5 tail --pid="$pid" -f /dev/null; }
    kill -KILL "$pid" 2>/dev/null
  done
  for i in c $(seq "$nodes"); do ip netns del "$prefix$i"; done
  rm -rf "$dir"/{nodes,pid,state,spool,gpu,munge}
}

case ${1:-} in
up) up "${2:?how many nodes?}" ;;
down) down ;;
exec) at_controller "${@:2}" ;;
node) exec nsenter -t "$(pgrep -P "$(cat "$dir/pid/n$2")" | head -1)" -n -u -m -p "${@:3}" ;;
crash) kill -KILL "$(cat "$dir/pid/n$2")" ;;
boot) boot "$2" ;;
cut) ip -n "${prefix}c" link set "v$2" down ;;
heal) ip -n "${prefix}c" link set "v$2" up ;;
*) sed -n 2,10p "$0"; exit 2 ;;
esac
