// Test top with the overlay's ports: copies from port 0 to port 1 in bursts of up to eight 64-bit beats, and fetches one
// word over the instruction port first. Register 0x18 makes it break one rule of AXI.
module skipopu_top (
  input clk, input rst, output reg irq,
  input [11:0] s_axil_awaddr, input s_axil_awvalid, output s_axil_awready,
  input [31:0] s_axil_wdata, input [3:0] s_axil_wstrb, input s_axil_wvalid, output s_axil_wready,
  output [1:0] s_axil_bresp, output reg s_axil_bvalid, input s_axil_bready,
  input [11:0] s_axil_araddr, input s_axil_arvalid, output s_axil_arready,
  output reg [31:0] s_axil_rdata, output [1:0] s_axil_rresp, output reg s_axil_rvalid, input s_axil_rready,
  output reg [63:0] m0_axi_araddr, output reg [7:0] m0_axi_arlen, output [2:0] m0_axi_arsize,
  output [1:0] m0_axi_arburst, output reg m0_axi_arvalid, input m0_axi_arready,
  input [63:0] m0_axi_rdata, input [1:0] m0_axi_rresp, input m0_axi_rlast, input m0_axi_rvalid, output m0_axi_rready,
  output [63:0] m0_axi_awaddr, output [7:0] m0_axi_awlen, output [2:0] m0_axi_awsize, output [1:0] m0_axi_awburst,
  output m0_axi_awvalid, input m0_axi_awready, output [63:0] m0_axi_wdata, output [7:0] m0_axi_wstrb,
  output m0_axi_wlast, output m0_axi_wvalid, input m0_axi_wready, input [1:0] m0_axi_bresp, input m0_axi_bvalid,
  output m0_axi_bready,
  output [63:0] m1_axi_araddr, output [7:0] m1_axi_arlen, output [2:0] m1_axi_arsize, output [1:0] m1_axi_arburst,
  output m1_axi_arvalid, input m1_axi_arready, input [63:0] m1_axi_rdata, input [1:0] m1_axi_rresp,
  input m1_axi_rlast, input m1_axi_rvalid, output m1_axi_rready,
  output reg [63:0] m1_axi_awaddr, output reg [7:0] m1_axi_awlen, output [2:0] m1_axi_awsize,
  output [1:0] m1_axi_awburst, output reg m1_axi_awvalid, input m1_axi_awready,
  output reg [63:0] m1_axi_wdata, output reg [7:0] m1_axi_wstrb, output reg m1_axi_wlast, output reg m1_axi_wvalid,
  input m1_axi_wready, input [1:0] m1_axi_bresp, input m1_axi_bvalid, output m1_axi_bready,
  output reg [63:0] mi_axi_araddr, output [7:0] mi_axi_arlen, output [2:0] mi_axi_arsize, output [1:0] mi_axi_arburst,
  output reg mi_axi_arvalid, input mi_axi_arready, input [255:0] mi_axi_rdata, input [1:0] mi_axi_rresp,
  input mi_axi_rlast, input mi_axi_rvalid, output mi_axi_rready
);
  localparam ARVALID_DROPS = 1, ARADDR_CHANGES = 2, WVALID_DROPS = 3, WDATA_CHANGES = 4, WLAST_EARLY = 5, AR_SIZE = 6,
    AR_FIXED = 7, FATAL = 8;
  assign m0_axi_arsize = bug == AR_SIZE ? 2 : 3, m0_axi_arburst = bug == AR_FIXED ? 0 : 1;
  assign m1_axi_awsize = 3, m1_axi_awburst = 1, m1_axi_bready = 1;
  assign mi_axi_arlen = 0, mi_axi_arsize = 5, mi_axi_arburst = 1, mi_axi_rready = 1;
  assign m0_axi_awvalid = 0, m0_axi_wvalid = 0, m0_axi_bready = 1, m1_axi_arvalid = 0, m1_axi_rready = 1;

  reg [63:0] src, dst;
  reg [31:0] left;
  reg [7:0] strobe;
  reg [3:0] bug;
  reg [31:0] fetched;
  reg [1:0] read_code, write_code, fetch_code;

  // Registers: 00 id, 04 source, 08 destination, 0c beats (starts), 10 strobe, 14 codes, 18 bug, 1c fetched, 20 irq off
  reg aw_held, w_held;
  reg [11:0] aw_address;
  reg [31:0] w_value;
  assign s_axil_awready = !aw_held, s_axil_wready = !w_held, s_axil_arready = !s_axil_rvalid;
  assign s_axil_bresp = aw_address == 12'hff0 ? 2 : 0, s_axil_rresp = 0;
  wire write = aw_held && w_held && !s_axil_bvalid && aw_address != 12'hff4;  // ff4: never answered
  wire start = write && aw_address == 12'h00c;

  reg [2:0] state;
  localparam IDLE = 0, FETCH = 1, ADDRESS = 2, READ = 3, WRITE = 4, RESPONSE = 5;
  reg [63:0] buffer [0:7];
  reg [3:0] at, size;
  wire [3:0] next_size = left > 8 ? 8 : left[3:0];
  assign m0_axi_rready = state == READ;

  always @(posedge clk) begin
    if (s_axil_awvalid && s_axil_awready) begin aw_held <= 1; aw_address <= s_axil_awaddr; end
    if (s_axil_wvalid && s_axil_wready) begin w_held <= 1; w_value <= s_axil_wdata; end
    if (s_axil_bvalid && s_axil_bready) begin s_axil_bvalid <= 0; aw_held <= 0; w_held <= 0; end
    if (write) begin
      s_axil_bvalid <= 1;
      case (aw_address)
        12'h004: src <= w_value;
        12'h008: dst <= w_value;
        12'h00c: left <= w_value;
        12'h010: strobe <= w_value;
        12'h018: bug <= w_value;
        12'h020: irq <= 0;
      endcase
      if (aw_address == 12'h018 && w_value == FATAL) $stop;
    end
    if (s_axil_rvalid && s_axil_rready) s_axil_rvalid <= 0;
    if (s_axil_arvalid && s_axil_arready) begin
      s_axil_rvalid <= 1;
      case (s_axil_araddr)
        12'h000: s_axil_rdata <= 32'h5ca1ab1e;
        12'h004: s_axil_rdata <= src;
        12'h014: s_axil_rdata <= {fetch_code, write_code, read_code};
        12'h01c: s_axil_rdata <= fetched;
        default: s_axil_rdata <= 0;
      endcase
    end

    if (m0_axi_arvalid && m0_axi_arready || bug == ARVALID_DROPS) m0_axi_arvalid <= 0;
    if (bug == ARADDR_CHANGES) m0_axi_araddr <= m0_axi_araddr + 8;
    if (m1_axi_awvalid && m1_axi_awready) m1_axi_awvalid <= 0;
    if (mi_axi_arvalid && mi_axi_arready) mi_axi_arvalid <= 0;
    case (state)
      IDLE: if (start && w_value != 0) begin state <= FETCH; mi_axi_araddr <= {src[63:5], 5'b0}; mi_axi_arvalid <= 1; end
      FETCH: if (mi_axi_rvalid) begin
        fetched <= mi_axi_rdata[255:224];
        fetch_code <= fetch_code | mi_axi_rresp;
        state <= ADDRESS;
      end
      ADDRESS: begin
        m0_axi_araddr <= src; m0_axi_arlen <= next_size - 1; m0_axi_arvalid <= 1;
        m1_axi_awaddr <= dst; m1_axi_awlen <= next_size - 1;
        size <= next_size; at <= 0; state <= READ;
      end
      READ: if (m0_axi_rvalid) begin
        buffer[at[2:0]] <= m0_axi_rdata;
        read_code <= read_code | m0_axi_rresp;
        at <= at + 1;
        if (m0_axi_rlast) begin state <= WRITE; m1_axi_awvalid <= 1; at <= 0; end
      end
      WRITE: begin
        if (bug == WDATA_CHANGES) m1_axi_wdata <= m1_axi_wdata + 1;
        if (!m1_axi_wvalid || m1_axi_wready) begin
          m1_axi_wvalid <= at != size;
          m1_axi_wdata <= buffer[at[2:0]];
          m1_axi_wstrb <= strobe;
          m1_axi_wlast <= at + 1 == (bug == WLAST_EARLY ? 2 : size);
          at <= at + 1;
          if (at == size) state <= RESPONSE;
        end else if (bug == WVALID_DROPS) m1_axi_wvalid <= 0;
      end
      RESPONSE: if (m1_axi_bvalid) begin
        write_code <= write_code | m1_axi_bresp;
        src <= src + size * 8; dst <= dst + size * 8; left <= left - size;
        state <= left == size ? IDLE : ADDRESS;
        if (left == size) irq <= 1;
      end
    endcase
    if (rst) begin
      {irq, aw_held, w_held, s_axil_bvalid, s_axil_rvalid, m0_axi_arvalid, m1_axi_awvalid, m1_axi_wvalid} <= 0;
      {mi_axi_arvalid, read_code, write_code, fetch_code, fetched, bug, state, left} <= 0;
      strobe <= 8'hff;
    end
  end
endmodule
