#!/usr/bin/env bash
# A real SLURM on this machine, as root: `cluster.sh start DIR [NODES]`, `cluster.sh stop DIR`. Several nodes are so many
# slurmd on one host, each with all of its CPUs.
set -euo pipefail
command=${1:?start or stop}
dir=$(realpath -m "${2:?folder for its configuration, state and logs}")
cpus=$(nproc)
host=$(hostname -s)
nodes=$(seq -f 'n%g' -s ' ' "${3:-1}")
memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)

stop() {
    if [ -f "$dir/slurmctld.pid" ] && SLURM_CONF=$dir/slurm.conf timeout 10 scancel --user=root; then sleep 3; fi
    for file in "$dir"/slurmd*.pid "$dir"/slurmctld.pid "$dir"/munged.pid; do
        pid=$(cat "$file" 2> /dev/null) && kill "$pid" 2> /dev/null && tail --pid="$pid" -f /dev/null
        rm -f "$file"
    done
    return 0
}

case $command in
    start)
        for daemon in slurmctld slurmd munged sbatch; do
            command -v "$daemon" > /dev/null || { echo "$daemon is missing: apt-get install slurm-wlm munge" >&2; exit 1; }
        done
        ! pidof slurmctld slurmd > /dev/null || { echo "a slurmctld or slurmd runs here already" >&2; exit 1; }
        mkdir -p "$dir/state" /run/munge
        chown munge: /run/munge
        chmod 755 /run/munge
        if [ ! -s /etc/munge/munge.key ]; then
            (umask 077 && dd if=/dev/urandom of=/etc/munge/munge.key bs=1024 count=1 status=none)
            chown munge: /etc/munge/munge.key
        fi
        cat > "$dir/slurm.conf" << CONF
ClusterName=test
SlurmctldHost=$host
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
ReturnToService=2
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
$(for n in $nodes; do
            echo "NodeName=$n NodeHostname=$host Port=$((17000 + ${n#n})) CPUs=$cpus RealMemory=$memory State=UNKNOWN"
        done)
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
CONF
        for n in $nodes; do grep -q "\s$n\$" /etc/hosts || echo "127.0.0.1 $n" >> /etc/hosts; done
        # munged is another user, who may not look into $dir
        runuser -u munge -- munged --pid-file=/run/munge/munged.pid --log-file=/run/munge/munged.log \
            --socket=/run/munge/munge.socket.2 --key-file=/etc/munge/munge.key
        cp /run/munge/munged.pid "$dir/munged.pid"
        trap stop ERR
        export SLURM_CONF=$dir/slurm.conf
        slurmctld -f "$SLURM_CONF"
        for n in $nodes; do slurmd -f "$SLURM_CONF" -N "$n"; done
        for _ in $(seq 60); do
            if [ "$(sinfo -h -N -p test -o %T 2> /dev/null | grep -c idle)" -eq "$(wc -w <<< "$nodes")" ]; then
                # Whoever asked for it may be killed.
                (tail --pid="$PPID" -f /dev/null; stop) > /dev/null 2>&1 < /dev/null &
                echo "export SLURM_CONF=$SLURM_CONF"
                exit 0
            fi
            sleep 0.5
        done
        tail -n 20 "$dir"/*.log >&2
        stop
        exit 1
        ;;
    stop) stop ;;
esac
