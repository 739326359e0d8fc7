import os
import signal

from imitate_ds.training.drain import listening


def test_signals_only_raise_the_flag_and_the_first_is_named():
    before = signal.getsignal(signal.SIGUSR1)
    with listening() as drain:
        assert not drain.signal
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert drain.signal == signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) == before
