"""Run `llmtrain train` several times, one fork each, with the refusal of settings that nothing reads switched
off: for the tests that prove that nothing reads them.

Usage: unread_worker.py ARGUMENTS, a JSON list of lists. Prints each exit status on a line of its own.
"""

import json
import os
import sys

import llmtrain.train.accelerate_engine
import llmtrain.train.assemble
import llmtrain.train.check
import llmtrain.train.unread
from llmtrain.cli.main import main

for arguments in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        llmtrain.train.unread.unread = lambda *_: []
        llmtrain.train.check.unread = lambda *_: []
        sys.argv = ["llmtrain", *arguments]
        main()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
