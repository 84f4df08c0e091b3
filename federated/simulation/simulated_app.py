"""In Flower's simulation engine: virtual nodes have no settings of their own, so each question names the guard that is to answer it.

Never part of what a hospital runs: there the hospital says where its guard is.
"""

import time

from client_app import answered_by
from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from server_app import POLL_SECONDS, carry, query

server = ServerApp()
client = ClientApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """The names in a job are numbers of guards."""

    def question(number: str, frame: bytes) -> Message:
        while len(nodes := sorted(grid.get_node_ids())) <= int(number):  # they appear after this program
            time.sleep(POLL_SECONDS)
        message = query(nodes[int(number)], frame)
        message.content["guard"] = ConfigRecord({"number": number})
        return message

    carry(grid, str(context.run_config["relay"]), question)


@client.query()
def virtual(message: Message, context: Context) -> Message:
    """The socket of that number in the folder that the run names."""
    return answered_by(f"{context.run_config['guards']}/{int(message.content['guard']['number'])}.sock", message)
